"""Folders: what `transformers` answered for them, bit-for-bit export, and every damage named.

The golden logits were recorded by tests/golden/logits_by_transformers.py.
"""

import json
import sys
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from instructjax import models
from instructjax.core.errors import UserError
from instructjax.models import interop
from instructjax.models.interop import huggingface
from instructjax.rl import scoring
from tests import tiny
from tests.models.interop.conftest import GOLDEN_FOLDER, write

TOKEN_BL = np.arange(20, dtype=np.int32).reshape(2, 10) * 7 % 17
RIGHT_BL = np.arange(10)[None] < np.array([[10], [6]])


def load(folder, one_device):
  source = interop.open_weights(folder)
  found = interop.describe(source)
  model = tiny.make_model(found.cfg, found.vocab_size, found.head)
  return model, interop.load_params(source, model, one_device(model))


def test_logits_equal_those_of_transformers(golden, golden_folder, one_device, quick_jit):
  model, params = load(golden_folder, one_device)
  forward = quick_jit(models.apply, static_argnums=0)
  for side, mask_BL in (("right", RIGHT_BL), ("left", RIGHT_BL[:, ::-1])):
    mask_BL = jnp.asarray(mask_BL)
    logits_BLV = forward(
      model,
      params,
      TOKEN_BL,
      segment_BL=mask_BL.astype(jnp.int32),
      position_BL=models.positions_from_mask(mask_BL),
    )
    expected = np.array(golden[side])
    np.testing.assert_allclose(np.asarray(logits_BLV)[mask_BL], expected, rtol=0, atol=3e-5)
    assert np.abs(expected).max() > 1


def test_export_is_bit_for_bit(golden, golden_folder, tmp_path, one_device):
  model, params = load(golden_folder, one_device)
  interop.write_folder(tmp_path / "out", model, params, {"eos_token_id": 7})
  before = safetensors.numpy.load_file(golden_folder / "model.safetensors")
  after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert before.keys() == after.keys()
  for name in before:
    assert before[name].tobytes() == after[name].tobytes() and after[name].dtype == np.float32
  with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}, "transformers insists"
  header_bytes = (tmp_path / "out" / "model.safetensors").read_bytes()[:8]
  assert int.from_bytes(header_bytes, "little") % 8 == 0, "tensors lie aligned, as the format asks"
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
  assert interop.describe(interop.open_weights(tmp_path / "out")).cfg == model.network


def test_bfloat16_is_rounded_to_nearest(folder, tmp_path, one_device):
  model, params = load(folder, one_device)
  huggingface.write_folder(tmp_path / "out", model, params, {}, 3000, "bfloat16")
  read = lambda path: {
    name: array
    for file in path.glob("*.safetensors")
    for name, array in safetensors.numpy.load_file(file).items()
  }
  exact, rounded = read(folder), read(tmp_path / "out")
  assert exact.keys() == rounded.keys() and len(list((tmp_path / "out").iterdir())) > 4
  for name, array in rounded.items():
    np.testing.assert_array_equal(array, exact[name].astype(jnp.bfloat16), strict=True)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["torch_dtype"] == "bfloat16"
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in rounded.values())


def test_shards(folder, tmp_path, one_device):
  model, params = load(folder, one_device)
  huggingface.write_folder(tmp_path / "out", model, params, {}, shard_bytes=6000)
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
  assert [file.name for file in files] == [
    f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
  ]
  assert len(files) > 2 and max(sizes) <= 6000
  assert index["metadata"]["total_size"] == sum(sizes)
  first, second = interop.open_weights(folder), interop.open_weights(tmp_path / "out")
  assert first.shapes == second.shapes
  assert first.files == (folder / "config.json", folder / "model.safetensors")
  names = ["config.json", "model.safetensors.index.json", *(file.name for file in files)]
  assert second.files == tuple(tmp_path / "out" / name for name in names)
  for name in first.shapes:
    np.testing.assert_array_equal(first.read(name), second.read(name))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_dtypes_read_as_float32(dtype, folder, monkeypatch):
  monkeypatch.setattr(huggingface, "_BLOCK", 7)  # several blocks
  numpy_dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
  array = np.random.default_rng(0).normal(0, 1, (5, 4)).astype(numpy_dtype)
  write_raw(folder, {"a": dict(dtype=dtype, shape=[5, 4])}, array.tobytes())
  found = interop.open_weights(folder).read("a")
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, array.astype(np.float32))


def write_raw(folder, header, data, name="model.safetensors"):
  """A safetensors file whose tensors, if no offsets are given, all span the data."""
  header = {key: {"data_offsets": [0, len(data)]} | entry for key, entry in header.items()}
  text = json.dumps(header).encode()
  (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- scalar heads ---------------------------------------------------------------------------------

SCORES = json.loads((GOLDEN_FOLDER / "scores.json").read_text())


@pytest.mark.parametrize("name", SCORES["cases"])
def test_scores_equal_those_of_transformers(name, tmp_path, one_device, quick_jit):
  """Read at the last token that is not the pad: before the EOS, where the EOS is the pad."""
  case = SCORES["cases"][name]
  folder = write(tmp_path / "model", case)
  model, params = load(folder, one_device)
  assert model.head == "scalar"
  skips = interop.pad_id(interop.open_weights(folder))
  assert skips == case["config"]["pad_token_id"]
  length = max(map(len, SCORES["sequences"]))
  rows = [one + [model.vocab_size] * (length - len(one)) for one in SCORES["sequences"]]
  is_token = np.array(rows) != model.vocab_size
  score = quick_jit(scoring.sequence_score, static_argnums=(0, 4))
  found = score(model, params, np.array(rows, np.int32), is_token, skips)
  np.testing.assert_allclose(found, case["scores"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [-1, True, "0", [0]])
def test_a_pad_that_is_no_id_is_refused(value, folder):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": value}))
  with pytest.raises(UserError, match="pad_token_id=.* must be the id of a token"):
    interop.pad_id(interop.open_weights(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scalar_head_comes_back(family, request, make, tmp_path, one_device, quick_jit):
  model, params = make(request.getfixturevalue(family), "scalar", num_layers=1)
  interop.write_folder(tmp_path / "out", model, params, {})
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["architectures"][0].endswith("ForSequenceClassification")
  assert (config["pad_token_id"], config["vocab_size"], len(config["id2label"])) == (19, 20, 1)
  again, loaded = load(tmp_path / "out", one_device)
  assert (again.vocab_size, again.head) == (19, "scalar")
  token_BL = jnp.asarray([[3, 1, 4]])
  score = lambda tree: quick_jit(models.apply, static_argnums=0)(
    model, tree, token_BL, segment_BL=jnp.ones_like(token_BL), position_BL=jnp.arange(3)[None]
  )
  np.testing.assert_allclose(score(loaded), score(params), rtol=1e-5, atol=1e-5)


# --- damage ---------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder, tmp_path, one_device, monkeypatch):
  model, params = load(folder, one_device)
  before = sorted(folder.iterdir())
  with pytest.raises(ValueError, match="model is there already; nothing is overwritten"):
    interop.write_folder(folder, model, params, {})
  assert sorted(folder.iterdir()) == before
  (tmp_path / "empty").mkdir()
  interop.write_folder(tmp_path / "empty", model, params, {})
  assert (tmp_path / "empty" / "config.json").is_file()

  def disk_full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(huggingface, "write_safetensors", disk_full)
  with pytest.raises(UserError, match="cannot write .*/full: .*No space left"):
    interop.write_folder(tmp_path / "full", model, params, {})
  assert {path.name for path in tmp_path.iterdir()} == {"model", "empty"}


def refusal(path) -> str:
  with pytest.raises(ValueError) as error:
    interop.open_weights(path)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_not_weights(tmp_path):
  assert "must be a Hugging Face folder or a .gguf file, and it is not there" in refusal(
    tmp_path / "none"
  )
  (tmp_path / "notes.txt").touch()
  assert "notes.txt must be a Hugging Face folder or a .gguf file, and it is neither" in refusal(
    tmp_path / "notes.txt"
  )
  assert refusal(tmp_path) == f"{tmp_path} has no config.json"


@pytest.mark.parametrize(
  "text, message",
  [("{", "config.json must be JSON: "), ("[1]", "config.json must be a JSON object")],
)
def test_config_is_no_json_object(text, message, folder):
  (folder / "config.json").write_text(text)
  assert message in refusal(folder)


def test_no_safetensors(folder):
  (folder / "model.safetensors").unlink()
  assert "has no model.safetensors and no model.safetensors.index.json" in refusal(folder)
  (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_cut_off(kept, folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:kept])
  message = refusal(folder)
  assert "model.safetensors is cut off or damaged, or not a safetensors file: " in message


def test_trailing_bytes(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes() + b"x")
  message = refusal(folder)
  assert "model.safetensors is cut off or damaged" in message and "not fully covered" in message


@pytest.mark.parametrize(
  "header, message",
  [
    (b"not json", "not a safetensors file: Error while deserializing header: invalid JSON"),
    (b"\xff\xfe", "not a safetensors file: Error while deserializing header: invalid UTF-8"),
    (b"[1]", "not a safetensors file: Error while deserializing header: invalid JSON"),
    (b'{"a": {"dtype": "F32"}}', "missing field `shape`"),
    (
      b'{"a": {"dtype": "F32", "data_offsets": [0], "shape": []}}',
      "or not a safetensors file",
    ),
    (
      b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
      "invalid shape, data type, or offset for tensor",
    ),
    (
      b'{"a": {"dtype": "\\u001b\\n", "shape": [4], "data_offsets": [0, 4]}}',
      "unknown variant `",  # and then characters that a terminal would obey
    ),
    (
      b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}',
      "model.safetensors: tensor a is F8_E4M3, and must be one of F32, F16, BF16",
    ),
  ],
)
def test_damaged_header(header, message, folder):
  data = len(header).to_bytes(8, "little") + header + b"1234"
  (folder / "model.safetensors").write_bytes(data)
  assert message in refusal(folder) and refusal(folder).isprintable()


def test_file_cut_off_after_it_was_opened(folder):
  source = interop.open_weights(folder)
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-40])
  with pytest.raises(UserError, match="model.safetensors is cut off or damaged"):
    source.read("model.norm.weight")


def test_buffers_of_other_dtypes_are_let_pass(folder):
  write_raw(folder, {"h.0.attn.bias": dict(dtype="BOOL", shape=[4])}, b"1234")
  assert interop.open_weights(folder).shapes == {"h.0.attn.bias": (4,)}


@pytest.mark.parametrize(
  "weight_map, message",
  [
    (None, "model.safetensors.index.json lacks 'weight_map'"),
    ({"a": "x.safetensors"}, "index.json names the shard x.safetensors, which is not there"),
    ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors lacks tensor b, which"),
    ({"a": "one.safetensors", "b": "two.safetensors"}, "two.safetensors holds tensor c, which"),
  ],
)
def test_index_that_does_not_fit(weight_map, message, folder):
  entry = dict(dtype="F32", shape=[1])
  write_raw(folder, {"a": entry}, b"1234", "one.safetensors")
  second = entry | {"data_offsets": [4, 8]}
  write_raw(
    folder, {"b": entry | {"data_offsets": [0, 4]}, "c": second}, b"12345678", "two.safetensors"
  )
  (folder / "model.safetensors").unlink()
  index = {} if weight_map is None else {"weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  assert message in refusal(folder)


def test_wrong_tensor_names_the_folder(folder, one_device):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 25}))
  with pytest.raises(ValueError) as error:
    load(folder, one_device)
  assert str(error.value) == (
    f"{folder}: tensor model.layers.0.mlp.gate_proj.weight has shape [24, 16], and the model needs"
    " [25, 16]"
  )


# --- the hub --------------------------------------------------------------------------------------


def test_download(tmp_path, monkeypatch):
  calls = []

  def snapshot_download(repository, revision, allow_patterns):
    calls.append((repository, revision))
    if repository == "org/secret":
      raise OSError("401 Client Error\nmore")
    return str(tmp_path)

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  assert interop.download("org/name") == tmp_path
  assert interop.download("org/name@v1") == tmp_path
  assert calls == [("org/name", None), ("org/name", "v1")]
  with pytest.raises(UserError, match="^hf://org/secret cannot be fetched: 401 Client Error$"):
    interop.download("org/secret")


def test_download_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"^hf://org/name needs the hub extra: pip install .*\[hub\]"):
    interop.download("org/name")


def test_a_hub_error_without_a_message_is_told_by_its_type(monkeypatch):
  def snapshot_download(*args, **kwargs):
    raise TimeoutError

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  with pytest.raises(UserError, match="hf://org/model cannot be fetched: TimeoutError"):
    interop.download("org/model")


# --- what is no folder of weights -----------------------------------------------------------------


def test_a_single_file_wins_over_an_index(folder, caplog):
  """As in transformers, whose order is model.safetensors, then the index: a stale index decides nothing."""
  with caplog.at_level("WARNING"):
    alone = interop.open_weights(folder)
    interop.describe(alone)
  assert not caplog.messages
  entry = dict(dtype="F32", shape=[1])
  write_raw(folder, {"a": entry}, b"1234", "one.safetensors")
  for weight_map in ({"a": "one.safetensors"}, {"a": "gone.safetensors"}, 5):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    caplog.clear()
    with caplog.at_level("WARNING"):
      found = interop.open_weights(folder)
      interop.describe(found)
    assert found.shapes == alone.shapes and found.files == alone.files
    assert caplog.messages == [
      f"{folder}: model.safetensors is read, as in transformers, and model.safetensors.index.json is"
      " not used; delete the stale one"
    ]


def test_a_shard_that_the_index_does_not_name_is_said(folder):
  shapes = interop.open_weights(folder).shapes
  (folder / "model.safetensors").rename(folder / "a.safetensors")
  (folder / "old.safetensors").touch()
  weight_map = dict.fromkeys(shapes, "a.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  found = interop.open_weights(folder)
  assert found.shapes == shapes
  assert found.notes == (
    "old.safetensors is not read: model.safetensors.index.json does not name it",
  )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "index", "shard"])
def test_git_lfs_pointers(name, folder):
  if name in ("index", "shard"):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    weight_map = {"weight_map": {"a": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
  file = {"index": "model.safetensors.index.json", "shard": "one.safetensors"}.get(name, name)
  (folder / file).write_bytes(POINTER)
  assert refusal(folder) == (
    f"{folder / file} is a Git LFS pointer, a note in the place of the real file; run `git lfs pull`"
    " in its folder, or download the file itself"
  )
  (folder / "x.gguf").write_bytes(POINTER)
  assert "x.gguf is a Git LFS pointer" in refusal(folder / "x.gguf")


def test_an_adapter_is_no_model(folder):
  (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
  assert (
    f"{folder} is an adapter (LoRA), not a whole model: it has adapter_config.json, and no"
    in (refusal(folder))
  )


@pytest.mark.parametrize(
  "file, advice",
  [
    ("pytorch_model.bin", "convert pytorch_model.bin with save_pretrained(..., safe_serial"),
    ("pytorch_model-00001-of-00002.bin", "convert pytorch_model-00001-of-00002.bin with"),
    ("pytorch_model.bin.index.json", "convert pytorch_model.bin.index.json with"),
    ("model.pt", "convert model.pt with"),
    ("last.ckpt", "convert last.ckpt with"),
    ("consolidated.00.pth", "consolidated.00.pth is in the model's own format"),
    ("tf_model.h5", "tf_model.h5 is TensorFlow's; load it with from_tf=True"),
    ("flax_model.msgpack", "flax_model.msgpack is Flax's; load it with from_flax=True"),
    ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors is one of several"),
    ("model.fp16.safetensors", "model.fp16.safetensors has another name"),
    ("model.q4.gguf", "it has model.q4.gguf; give the path of that file"),
  ],
)
def test_weights_of_other_kinds_are_said_in_words(file, advice, folder):
  (folder / "model.safetensors").unlink()
  (folder / file).touch()
  lacks = f"{folder} has no model.safetensors and no model.safetensors.index.json; "
  assert refusal(folder).startswith(lacks + advice)
  (folder / "config.json").unlink()
  assert refusal(folder).startswith(f"{folder} has no config.json; {advice}")


def test_paths_that_no_file_system_takes(tmp_path):
  for name in ("x" * 5000, "a\0b", "\ud800"):
    assert "must be a Hugging Face folder or a .gguf file, and it cannot be read" in refusal(
      tmp_path / name
    )
  assert "is neither; give the folder that it is in" in refusal(
    next(path for path in [tmp_path / "a.safetensors"] if path.touch() is None)
  )


@pytest.mark.parametrize(
  "shard",
  [
    *(
      "../one.safetensors",
      "/etc/one.safetensors",
      "sub/one.safetensors",
      "x" * 300 + ".safetensors",
    ),
    *("one.bin", "", "a\0.safetensors", "a\n.safetensors"),
    *(None, 5, True, [], {}, ["one.safetensors"]),
  ],
)
def test_shards_that_are_no_names(shard, folder):
  (folder / "model.safetensors").unlink()
  index = {"weight_map": {"a": "one.safetensors", "b": shard}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  message = refusal(folder)
  assert "weight_map gives 'b' the shard " in message and message.isprintable()
  assert "must be the name of a .safetensors file in the same folder" in message


@pytest.mark.parametrize("shape", [[], [0], [3, 0]])
def test_tensors_without_numbers(shape, folder):
  data = b"1234" if shape == [] else b""
  write_raw(folder, {"a": dict(dtype="F32", shape=shape)}, data)
  assert f"tensor a of shape {shape} holds no weights" in refusal(folder)


def test_a_header_that_takes_long_is_not_parsed(folder):
  with (folder / "model.safetensors").open("wb") as file:
    file.write((90_000_000).to_bytes(8, "little"))
    file.truncate(90_000_100)  # a hole: nothing is written
  assert "has a header of 90000000 bytes, and at most 16777216 are read" in refusal(folder)
