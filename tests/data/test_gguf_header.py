"""The header of a GGUF file, against the `gguf` package, and every way in which a file breaks."""

import struct

import gguf
import numpy as np
import pytest

from instructjax.data import gguf_header


@pytest.fixture
def path(tmp_path):
  """A file of every kind of value and two tensors."""
  writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
  for name, value in (("uint8", 200), ("int8", -3), ("uint16", 65000), ("int16", -300)):
    getattr(writer, f"add_{name}")(f"test.{name}", value)
  for name, value in (("uint32", 2**31), ("int32", -(2**30)), ("uint64", 2**63), ("int64", -1)):
    getattr(writer, f"add_{name}")(f"test.{name}", value)
  writer.add_float32("test.float32", 0.5)
  writer.add_float64("test.float64", 0.1)
  writer.add_bool("test.bool", True)
  writer.add_array("test.numbers", [1, -2, 3])
  writer.add_array("test.flags", [True, False])
  writer.add_array("test.words", ["a", "Ġé", "\n"])
  writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
  writer.add_tensor("two", np.zeros((3, 2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tmp_path / "model.gguf"


def test_values_and_tensors(path):
  header = gguf_header.read(path)
  assert header.metadata == {
    "general.architecture": "llama",
    "test.uint8": 200,
    "test.int8": -3,
    "test.uint16": 65000,
    "test.int16": -300,
    "test.uint32": 2**31,
    "test.int32": -(2**30),
    "test.uint64": 2**63,
    "test.int64": -1,
    "test.float32": 0.5,
    "test.float64": 0.1,
    "test.bool": True,
    "test.numbers": [1, -2, 3],
    "test.flags": [True, False],
    "test.words": ["a", "Ġé", "\n"],
  }
  one, two = header.tensors["one"], header.tensors["two"]
  assert (one.shape, one.num_rows, one.row_bytes) == ((2, 3), 2, 12)
  assert (two.shape, two.num_rows, two.row_bytes) == ((3, 2, 32), 6, 34)
  offsets = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(path).tensors}
  assert offsets == {name: tensor.offset for name, tensor in header.tensors.items()}


def test_alignment_is_the_files(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
  writer.add_custom_alignment(1024)
  writer.add_tensor("one", np.ones(3, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert gguf_header.read(tmp_path / "aligned.gguf").tensors["one"].offset == 1024


def refusal(path) -> str:
  with pytest.raises(ValueError) as caught:
    gguf_header.read(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  return str(caught.value)


def test_a_file_cut_off_anywhere_is_refused(path):
  whole = path.read_bytes()
  end = gguf_header.read(path).tensors["two"].offset + 6 * 34
  for size in range(0, end, 7):  # every kind of field is cut somewhere
    path.write_bytes(whole[:size])
    refusal(path)
  path.write_bytes(whole[:end])  # only the padding is gone
  gguf_header.read(path)


def test_where_it_was_cut_off_is_said(path):
  whole = path.read_bytes()
  for inside, word in (
    (whole.index(b"test.words") + 40, "ends inside metadata key 'test.words'"),
    (whole.index(b"test.words") + 4, "the name of metadata key 15 of 15"),
    (whole.index(b"one") + 10, "ends inside the entry of tensor 'one'"),
    (len(whole) - 40, "tensor 'two' reaches to byte"),
  ):
    path.write_bytes(whole[:inside])
    assert word in refusal(path)


def test_not_gguf(tmp_path):
  path = tmp_path / "x.gguf"
  assert "cannot be read: No such file" in refusal(path)
  for content in (b"", b"GG", b"GGML" + bytes(100), b"PK" + bytes(100)):
    path.write_bytes(content)
    assert "is not a GGUF file" in refusal(path)
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
  assert "is GGUF version 1;" in refusal(path)


def test_big_endian(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  assert "is a big-endian GGUF file" in refusal(tmp_path / "big.gguf")


def text(value: str) -> bytes:
  return struct.pack("<Q", len(value)) + value.encode()


def file_of(keys: list[bytes], tensors: list[bytes]) -> bytes:
  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
  return head + b"".join(keys) + b"".join(tensors) + bytes(256)


def tensor(name="t", dims=(32,), kind=8, offset=0) -> bytes:
  sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
  return text(name) + sizes + struct.pack("<IQ", kind, offset)


KEY = text("k") + struct.pack("<II", 4, 1)
DAMAGED = {
  "two keys": ([KEY, KEY], [], "metadata key 'k' is there twice"),
  "value type": ([text("k") + struct.pack("<I", 99)], [], "'k' has the unknown value type 99"),
  "item type": ([text("k") + struct.pack("<IIQ", 9, 99, 1)], [], "unknown value type 99"),
  "arrays of arrays": ([text("k") + struct.pack("<IIQ", 9, 9, 1)], [], "unknown value type 9"),
  "huge array": (
    [text("k") + struct.pack("<IIQ", 9, 4, 2**62)],
    [],
    "ends inside metadata key 'k'",
  ),
  "not utf-8": (
    *([text("k") + struct.pack("<IQ", 8, 1) + b"\xff"], []),
    "'k' holds text that is not UTF-8",
  ),
  "two tensors": ([], [tensor(), tensor()], "tensor 't' is there twice"),
  "type of tensor": ([], [tensor(kind=77)], "tensor 't' has type 77"),
  "row": ([], [tensor(dims=(33,))], "tensor 't' has shape (33,); Q8_0 needs rows of a multiple"),
  "nothing in it": ([], [tensor(dims=(32, 0))], "tensor 't' has shape (0, 32)"),
  "no dimension": ([], [tensor(dims=())], "tensor 't' has shape ()"),
  "overflow": ([], [tensor(dims=(32, 2**33, 2**33))], "tensor 't' reaches to byte"),
  "offset": ([], [tensor(offset=4096)], "tensor 't' reaches to byte"),
  "overlap": ([], [tensor(), tensor("u", offset=32)], "tensors 't' and 'u' share bytes"),
  "dimensions": ([], [tensor(dims=(32,) * 5)], "tensor 't' has 5 dimensions, and at most 4"),
  "alignment of no power of two": (
    *([text("general.alignment") + struct.pack("<II", 4, 24)], []),
    "general.alignment=24 must be a positive power of two",
  ),
  "alignment": (
    *([text("general.alignment") + struct.pack("<II", 4, 0)], []),
    "general.alignment=0 must be a positive power of two",
  ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, tmp_path):
  keys, tensors, message = DAMAGED[case]
  path = tmp_path / "damaged.gguf"
  path.write_bytes(file_of(keys, tensors))
  assert message in refusal(path)


def test_counts_are_bounded_before_anything_is_read(tmp_path):
  path = tmp_path / "counts.gguf"
  for tensors, keys, message in (
    (2**60, 0, f"it says that it has {2**60} tensors, and at most 131072 are read"),
    (0, 2**60, f"it says that it has {2**60} metadata keys"),
  ):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(10**6))
    assert message in refusal(path)


def test_arrays_are_bounded_together(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_header, "_MAX_ITEMS", 10)
  path = tmp_path / "arrays.gguf"
  one = lambda name: text(name) + struct.pack("<IIQ", 9, 0, 6) + bytes(6)
  path.write_bytes(file_of([one("a")], []))
  gguf_header.read(path)
  path.write_bytes(file_of([one("a"), one("b")], []))
  assert "metadata key 'b' and those before it have 12 items in arrays" in refusal(path)


def test_names_are_cut_and_printable(tmp_path):
  path = tmp_path / "names.gguf"
  long = text("k\x1b[31m\n" + "x" * 100_000) + struct.pack("<I", 99)
  path.write_bytes(file_of([long], []))
  assert refusal(path).isprintable() and len(refusal(path)) < 400
  path.write_bytes(file_of([], [tensor(name="\n" * 9999, kind=77)]))
  assert refusal(path).isprintable() and len(refusal(path)) < 400
