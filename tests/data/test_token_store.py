"""Token ids on disk: what is written is read, few bytes a token, and any damage is noticed."""

import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import token_store
from instructjax.data.packing import Damaged
from instructjax.data.token_store import Encoded
from tests import micro

SEQUENCES = [Encoded([5, 6, 7], 1), Encoded([8]), Encoded([9, 10, 11, 12, 65535], 2)]


def write(folder, sequences=SEQUENCES, vocab_size=1 << 16):
  with token_store.Writer(folder, vocab_size) as writer:
    for sequence in sequences:
      writer.add(sequence)
    writer.finish({"long": [3, ""]}, {"of": "a test"})
  return folder


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_what_is_written_is_read(tmp_path, vocab_size, itemsize):
  folder = write(tmp_path / "store", vocab_size=vocab_size)
  store = token_store.open_store(folder)
  assert [*store] == SEQUENCES and store.left_out == {"long": [3, ""]}
  assert (len(store), store.num_tokens) == (3, 9)
  assert (folder / "tokens").stat().st_size == 9 * itemsize
  token_store.check_store(folder)
  memory = micro.in_memory(SEQUENCES, vocab_size)
  assert [*memory] == SEQUENCES
  assert token_store.open_store(tmp_path / "none") is None
  # Rows of both are the same, and so is what a checkpoint knows them by.
  packed = [one.pack(6, vocab_size, splits=False) for one in (store, memory)]
  token_store.write_rows(tmp_path / "rows", packed[0])
  again = token_store.open_rows(tmp_path / "rows", store)
  for rows in (packed[1], again):
    assert rows.checksum == packed[0].checksum
    batches = [one.gather(np.array([1, 0])) for one in (rows, packed[0])]
    for name in ("token_BL", "segment_BL", "position_BL", "weight_BL"):
      np.testing.assert_array_equal(*[getattr(batch, name) for batch in batches])
  assert token_store.open_rows(tmp_path / "none", store) is None


def test_bytes_a_token_of_short_documents(tmp_path):
  """At most 6 with rows of three lengths, for documents of 30 tokens and a vocabulary of 100,000."""
  rng = np.random.default_rng(0)
  ids = [Encoded(rng.integers(0, 100_000, 30).tolist()) for _ in range(4000)]
  store = token_store.open_store(write(tmp_path / "store", ids, vocab_size=100_000))
  for length in (32, 512, 2048):
    rows = store.pack(length, 100_000, splits=True)
    token_store.write_rows(tmp_path / f"rows-{length}", rows)
  size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
  assert size / store.num_tokens < 6


def test_files_are_closed_with_the_store(tmp_path):
  folder = write(tmp_path / "store")
  count = lambda: len(os.listdir("/proc/self/fd"))
  gc.collect()
  before = count()
  stores = [token_store.open_store(folder) for _ in range(5)]
  assert count() > before
  del stores
  gc.collect()
  assert count() == before


def test_any_flipped_bit_is_noticed_before_rows_are_packed(tmp_path):
  folder = write(tmp_path / "store")
  for path in sorted(folder.iterdir()):
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
      path.write_bytes(
        whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
      )
      with pytest.raises(Damaged):
        token_store.open_store(folder)
        token_store.check_store(folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(Damaged, match="bytes|header|checksum|Expecting|Unterminated"):
      token_store.open_store(folder)
    path.write_bytes(whole)
  token_store.check_store(folder)
  (folder / "ends").unlink()
  with pytest.raises(Damaged, match="No such file"):
    token_store.open_store(folder)


def test_any_flipped_bit_is_noticed_when_its_row_is_read(tmp_path):
  rng = np.random.default_rng(1)
  # Sizes below 9, so that the prompts' lengths fit; documents of up to three rows would be split alike.
  sequences = [
    Encoded(rng.integers(0, 50, size).tolist(), int(size) // 2) for size in rng.integers(1, 9, 30)
  ]
  folder = write(tmp_path / "store", sequences)
  store = token_store.open_store(folder)
  token_store.write_rows(tmp_path / "rows", store.pack(16, 50, splits=False))
  everything = np.arange(token_store.open_rows(tmp_path / "rows", store).num_rows)
  expected = token_store.open_rows(tmp_path / "rows", store).gather(everything)
  files = [folder / "tokens", *(p for p in (tmp_path / "rows").iterdir() if p.suffix != ".json")]
  assert len(files) == 6
  for path in files:
    whole = path.read_bytes()
    for place in range(len(whole)):
      path.write_bytes(
        whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
      )
      opened = token_store.open_store(folder)
      with pytest.raises(Damaged):
        token_store.open_rows(tmp_path / "rows", opened).gather(everything)
    path.write_bytes(whole)
  again = token_store.open_rows(tmp_path / "rows", token_store.open_store(folder)).gather(
    everything
  )
  np.testing.assert_array_equal(again.token_BL, expected.token_BL)


def test_a_file_that_is_cut_off_while_it_is_open_is_noticed(tmp_path):
  folder = write(tmp_path / "store")
  store = token_store.open_store(folder)
  os.truncate(folder / "tokens", 2 * 6)
  assert store[1] == SEQUENCES[1]
  with pytest.raises(Damaged, match="tokens: it ends too early"):
    store[2]


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
  sequences=st.lists(
    st.lists(st.integers(0, 69_999), min_size=1, max_size=9).flatmap(
      lambda ids: st.builds(Encoded, st.just(ids), st.integers(0, len(ids)))
    ),
    min_size=1,
    max_size=12,
  ),
  length=st.integers(10, 24),
)
def test_any_sequences_are_read_from_the_rows_that_they_were_packed_into(
  tmp_path_factory, sequences, length
):
  folder = tmp_path_factory.mktemp("stores")
  store = token_store.open_store(write(folder / "store", sequences, vocab_size=70_000))
  assert [*store] == sequences
  token_store.write_rows(folder / "rows", store.pack(length, 70_000, splits=False))
  rows = token_store.open_rows(folder / "rows", store)
  batch = rows.gather(np.arange(rows.num_rows))
  found = []
  for token_L, segment_L, weight_L in zip(
    batch.token_BL, batch.segment_BL, batch.weight_BL, strict=True
  ):
    for segment in range(1, segment_L.max() + 1):
      is_here_L = segment_L == segment
      unweighted = int(np.sum(weight_L[is_here_L] == 0))
      found.append((token_L[is_here_L].tolist(), unweighted))
  # The first token of a sequence is never predicted.
  assert sorted(found) == sorted((one.ids, max(1, one.num_unweighted)) for one in sequences)
