"""Writing GGUF: what llama.cpp expects is in the file, and reading it back gives the same weights.

Files are looked at with the `gguf` package's reader as well as with ours.
"""

import dataclasses
import tracemalloc

import gguf
import jax
import numpy as np
import pytest

from instructjax import models
from instructjax.core import errors
from instructjax.core.config import MeshConfig, RopeScalingConfig
from instructjax.models import interop
from instructjax.models.interop import gguf_export
from instructjax.parallel import sharding
from tests import tiny

VOCAB = 7
LLAMA = dict(
  num_layers=2,
  d_model=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_mlp=40,
  position="rope",
  rope_base=700.0,
  norm="rmsnorm",
  mlp="swiglu",
)
LLAMA3 = RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192, 0.0)
YARN = RopeScalingConfig("yarn", 4.0, 1.0, 32.0, 512, 0.0)
NEOX = dict(
  d_model=32,
  num_heads=4,
  num_kv_heads=4,
  head_dim=8,
  position="rope",
  rope_base=700.0,
  rotary_dim=2,
  norm="layernorm",
  mlp="gelu_exact",
  parallel_residual=True,
  use_bias=True,
  tie_embeddings=False,
)
GEMMA3 = LLAMA | dict(
  num_layers=7,
  rope_local_base=10_000.0,
  rope_scaling=RopeScalingConfig("linear", 8.0, 1.0, 4.0, 8192, 0.0),
  norm="rmsnorm_1p",
  sandwich_norm=True,
  qk_norm=True,
  mlp="geglu",
  attention_window=5,
  layer_pattern="LLLLLG",
  scale_embeddings=True,
)
FAMILIES = {
  "llama": LLAMA,
  "untied": LLAMA | dict(tie_embeddings=False),
  "biases": LLAMA | dict(use_bias=True),
  "linear": LLAMA | dict(rope_scaling=dataclasses.replace(LLAMA3, kind="linear", factor=2.0)),
  "yarn": LLAMA | dict(rope_scaling=YARN),
  "yarn, attention": LLAMA | dict(rope_scaling=dataclasses.replace(YARN, attention_factor=1.5)),
  "llama3": LLAMA | dict(rope_base=500_000.0, rope_scaling=LLAMA3),
  "qwen2": LLAMA | dict(qkv_bias=True),
  "qwen3": LLAMA | dict(qk_norm=True, head_dim=6),
  "gptneox": NEOX,
  "gptneox tied": NEOX | dict(parallel_residual=False, rotary_dim=0, tie_embeddings=True),
  "smollm3": LLAMA | dict(num_layers=5, layer_pattern="GGGN"),
  "gemma3": GEMMA3,
  "gpt2": dict(d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, use_bias=True),
  "gpt2 untied": dict(
    **dict(d_model=32, num_heads=2, num_kv_heads=2, head_dim=16),
    use_bias=True,
    tie_embeddings=False,
  ),
}
TOKENIZER = {
  "tokenizer.ggml.model": "llama",
  "tokenizer.ggml.tokens": [f"<{i}>" for i in range(VOCAB)],
  "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
  "tokenizer.ggml.token_type": [1] * VOCAB,
  "tokenizer.ggml.merges": [],
  "tokenizer.ggml.eos_token_id": 2,
  "tokenizer.ggml.add_bos_token": False,
  "tokenizer.chat_template": "{{ messages }}",
}


@pytest.fixture
def make(tiny_config, random_params):
  """make(family, **changes): (model, random params)."""

  def one(family, head="lm", **changes):
    cfg = dataclasses.replace(tiny_config, **FAMILIES[family] | changes)
    model = tiny.make_model(cfg, VOCAB, head)
    return model, random_params(model)

  return one


def read_back(path, model):
  source = interop.open_weights(path)
  found = interop.describe(source)
  assert (found.vocab_size, found.head) == (VOCAB, "lm")
  wanted = dataclasses.replace(model.network, init_std=found.cfg.init_std)
  if model.network.position == "learned":  # no rotary base in such a file
    wanted = dataclasses.replace(wanted, rope_base=found.cfg.rope_base)
  assert found.cfg == wanted
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  return interop.load_params(source, model, models.param_shardings(mesh, model)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_f16_round_trip(family, make, tmp_path):
  model, params = make(family)
  path = tmp_path / "new" / "model.gguf"
  interop.write_file(path, model, params, TOKENIZER)
  got = read_back(path, model)

  def check(at, old, new):
    # Vectors and positions are kept as they are.
    exact = old.ndim == 1 or at[-1].key in ("position_TD", *BIASES)
    wanted = np.asarray(old) if exact else np.float16(old).astype(np.float32)
    if family == "gemma3" and "norm" in jax.tree_util.keystr(at):  # 1 is added, and taken away
      wanted = (wanted + np.float32(1)) - np.float32(1)
    np.testing.assert_array_equal(np.asarray(new), wanted, err_msg=jax.tree_util.keystr(at))

  assert jax.tree.structure(params) == jax.tree.structure(got)
  jax.tree_util.tree_map_with_path(check, params, got)
  assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


BIASES = ("b_qkv_GQK", "b_gate_up_2F")  # vectors in the file


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_q8_0_round_trip(family, make, tmp_path):
  """Blocks of 32 get a scale each: the error stays within their step; other rows are float16."""
  model, params = make(family)
  path = tmp_path / "model.gguf"
  interop.write_file(path, model, params, TOKENIZER, "q8_0")
  kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
  assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up.weight"] == "Q8_0"
  assert kinds["blk.0.attn_norm.weight"] == "F32"
  # Rows of d_mlp: 40 in the one, 24 in the other.
  assert kinds["blk.0.ffn_down.weight"] == "F16"
  got = read_back(path, model)
  table, new = np.asarray(params["embedding"]["token_VD"]), np.asarray(got["embedding"]["token_VD"])
  step = np.abs(table).max(axis=1, keepdims=True) / 127
  error = np.abs(new - table) / step
  # Half a step, and what rounding the scale to float16 adds to 127 steps.
  assert 0.1 < error.max() <= 0.5 + 127 * 2**-11
  for layer, new in zip(params["layers"], got["layers"], strict=True):
    down = np.float16(layer["mlp"]["w_down_FD"]).astype(np.float32)
    np.testing.assert_array_equal(new["mlp"]["w_down_FD"], down)


def test_what_llama_cpp_reads(make, tmp_path):
  model, params = make("llama")
  path = tmp_path / "model.gguf"
  interop.write_file(path, model, params, TOKENIZER, name="a name")
  reader = gguf.GGUFReader(path)
  fields = {key: field.contents() for key, field in reader.fields.items()}
  assert {key: fields[key] for key in fields if not key.startswith(("GGUF", "tokenizer"))} == {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "a name",
    "general.file_type": 1,
    "general.quantization_version": 2,
    "llama.context_length": 20,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 40,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    "llama.rope.freq_base": 700.0,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": VOCAB,
  }
  kind = gguf.GGUFValueType
  assert {key: reader.fields[key].types for key in fields if key.startswith("tokenizer")} == {
    "tokenizer.ggml.model": [kind.STRING],
    "tokenizer.ggml.tokens": [kind.ARRAY, kind.STRING],
    "tokenizer.ggml.scores": [kind.ARRAY, kind.FLOAT32],
    "tokenizer.ggml.token_type": [kind.ARRAY, kind.INT32],
    "tokenizer.ggml.eos_token_id": [kind.UINT32],
    "tokenizer.ggml.add_bos_token": [kind.BOOL],
    "tokenizer.chat_template": [kind.STRING],
  }
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  assert {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" in name} == {"F32"}
  # The second query head of the first key/value head: rows 0, 4, 1, 5 ... of the head's own order.
  w_KD = np.asarray(params["layers"][1]["attention"]["w_qkv_DGQK"])[:, 0, 1].T
  stored = tensors["blk.1.attn_q.weight"].data[8:16]
  np.testing.assert_array_equal(stored, w_KD[[0, 4, 1, 5, 2, 6, 3, 7]].astype(np.float16))


def test_gpt2_as_llama_cpp_wants_it(make, tmp_path):
  model, params = make("gpt2")
  interop.write_file(tmp_path / "model.gguf", model, params, TOKENIZER)
  tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
  np.testing.assert_array_equal(
    tensors["output.weight"].data, tensors["token_embd.weight"].data, "the tied head, again"
  )
  assert tensors["position_embd.weight"].tensor_type.name == "F32"
  up_DF = np.asarray(params["layers"][0]["mlp"]["w_up_DF"])
  np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight"].data, up_DF.T.astype(np.float16))


def test_gptneox_as_llama_cpp_wants_it(make, tmp_path):
  """All queries, then all keys, then all values, each of 4 heads of 8; the head, though it is tied."""
  model, params = make("gptneox tied")
  interop.write_file(tmp_path / "model.gguf", model, params, TOKENIZER)
  reader = gguf.GGUFReader(tmp_path / "model.gguf")
  tensors = {tensor.name: tensor.data for tensor in reader.tensors}
  layer = params["layers"][0]["attention"]
  for part in range(3):
    for head in range(4):
      rows = slice(32 * part + 8 * head, 32 * part + 8 * head + 8)
      w_KD = np.asarray(layer["w_qkv_DGQK"])[:, head, part].T.astype(np.float16)
      np.testing.assert_array_equal(tensors["blk.0.attn_qkv.weight"][rows], w_KD)
      b_K = np.asarray(layer["b_qkv_GQK"])[head, part]
      np.testing.assert_array_equal(tensors["blk.0.attn_qkv.bias"][rows], b_K)
  np.testing.assert_array_equal(tensors["output.weight"], tensors["token_embd.weight"])
  assert reader.fields["gptneox.use_parallel_residual"].contents() is False
  assert reader.fields["gptneox.rope.dimension_count"].contents() == 8


def test_gemma3_as_llama_cpp_wants_it(make, tmp_path):
  model, params = make("gemma3")
  interop.write_file(tmp_path / "model.gguf", model, params, TOKENIZER)
  reader = gguf.GGUFReader(tmp_path / "model.gguf")
  tensors = {tensor.name: tensor.data for tensor in reader.tensors}
  layer = params["layers"][6]
  for name, norm in (
    ("attn_norm", layer["attention_norm"]["scale_D"]),
    ("attn_q_norm", layer["attention"]["q_norm"]["scale_K"]),
    ("post_attention_norm", layer["attention_out_norm"]["scale_D"]),
    ("ffn_norm", layer["mlp_norm"]["scale_D"]),
    ("post_ffw_norm", layer["mlp_out_norm"]["scale_D"]),
  ):
    np.testing.assert_array_equal(tensors[f"blk.6.{name}.weight"], np.asarray(norm) + 1)
  np.testing.assert_array_equal(
    tensors["output_norm.weight"], np.asarray(params["final_norm"]["scale_D"]) + 1
  )
  assert reader.fields["gemma3.attention.sliding_window"].contents() == 5


@pytest.mark.parametrize(
  "family, changes, message",
  [
    (
      "llama3",
      dict(qkv_bias=True),
      "rope_scaling.kind='llama3' .* for llama only, and this is qwen2",
    ),
    (
      "llama3",
      dict(qk_norm=True),
      "rope_scaling.kind='llama3' .* for llama only, and this is qwen3",
    ),
    (
      "yarn",
      dict(rope_scaling=dataclasses.replace(YARN, high_freq_factor=16.0)),
      "high_freq_factor=16 cannot be .* has 1 and 32 built in for yarn",
    ),
    (
      "gemma3",
      dict(rope_scaling=dataclasses.replace(YARN, attention_factor=1.5)),
      "attention_factor=1.5 cannot be .* multiplies local layers by it too",
    ),
    (
      "qwen2",
      dict(attention_window=5, layer_pattern="GL"),
      "attention_window=5 cannot be .* has no windows for qwen2",
    ),
    ("gptneox", dict(mlp="gelu"), "mlp='gelu' cannot be .* one gelu of gptneox, gelu_exact"),
    ("smollm3", dict(layer_pattern="GGN"), "layer_pattern='GGN' cannot be .* has GGGN for smollm3"),
    ("smollm3", dict(use_bias=True), "use_bias=True cannot be .* has no biases for smollm3"),
    ("gemma3", dict(layer_pattern="LG"), "layer_pattern='LG' cannot be .* has LLLLLG for gemma3"),
    ("gemma3", dict(rope_local_base=9.0), "rope_local_base=9 cannot be .* has 10000 for gemma3"),
    (
      "gemma3",
      dict(query_pre_attn_scalar=9),
      "query_pre_attn_scalar=9 cannot be .* has 8 for this",
    ),
  ],
)
def test_what_llama_cpp_has_built_in(family, changes, message, make, tmp_path):
  """No key of the file could tell it: llama.cpp would compute something else without a word."""
  model, params = make(family, **changes)
  with pytest.raises(errors.UserError, match=message):
    gguf_export.write_file(tmp_path / "x.gguf", model, params, TOKENIZER)
  assert not list(tmp_path.iterdir())


def test_the_scores_of_the_largest_gemma3_are_scaled_by_its_width(make, tmp_path):
  """62 layers: 32 / 4 = 8 here, as 5376 / 32 = 168 of the 27B model, whose heads have 128."""
  sizes = dict(num_layers=62, head_dim=4, query_pre_attn_scalar=8, d_mlp=8)
  model, params = make("gemma3", **sizes)
  interop.write_file(tmp_path / "x.gguf", model, params, TOKENIZER)
  found = interop.describe(interop.open_weights(tmp_path / "x.gguf"))
  assert found.cfg.query_pre_attn_scalar == 8


def test_llama3_divisors_are_written(make, tmp_path):
  model, params = make("llama3")
  interop.write_file(tmp_path / "model.gguf", model, params, TOKENIZER)
  tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
  # Wavelengths 2 pi 500000^(i / 4): 6, 167, 4443, 118144 tokens; 8192 / 4443 = 1.844 turns.
  wanted = [1.0, 1.0, 1 / ((1 - 0.28127) / 8 + 0.28127), 8.0]
  np.testing.assert_allclose(tensors["rope_freqs.weight"].data, wanted, rtol=1e-4)


def test_one_tensor_at_a_time_is_held(make, tmp_path):
  sizes = dict(num_layers=6, d_model=256, num_heads=2, num_kv_heads=2, head_dim=128, d_mlp=512)
  model, params = make("llama", **sizes)
  largest, total = 256 * 512 * 4, 6 * (4 * 256 * 256 + 3 * 256 * 512) * 4
  path = tmp_path / "model.gguf"
  tracemalloc.start()
  interop.write_file(path, model, params, TOKENIZER, "q8_0")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 * largest < total / 4


def refusal(path, *args, **kwargs) -> str:
  with pytest.raises(ValueError) as caught:
    interop.write_file(path, *args, **kwargs)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_refused_before_anything_is_written(make, tmp_path):
  model, params = make("llama")
  path = tmp_path / "model.gguf"
  scalar, scalar_params = make("llama", head="scalar")
  assert "reward or value model cannot be" in refusal(path, scalar, scalar_params, TOKENIZER)
  short = TOKENIZER | {"tokenizer.ggml.tokens": ["a"]}
  assert "tokenizer's 1 tokens must be the model's vocab_size=7" in refusal(
    path, model, params, short
  )
  assert "kind='q4_0' of a GGUF file must be one of f16, q8_0" in refusal(
    path, model, params, TOKENIZER, "q4_0"
  )
  banded, banded_params = make("gpt2", attention_window=4, num_layers=2)
  assert "attention_window=4" in refusal(path, banded, banded_params, TOKENIZER)
  assert not list(tmp_path.iterdir())


def test_existing_file_is_never_overwritten(make, tmp_path):
  path = tmp_path / "model.gguf"
  path.write_text("precious")
  assert f"{path} exists and is never overwritten" in refusal(path, *make("llama"), TOKENIZER)
  assert path.read_text() == "precious"


@pytest.mark.parametrize(
  "kind, value", [("f16", np.nan), ("f16", 7e4), ("f16", -7e4), ("q8_0", np.inf), ("q8_0", 1e7)]
)
def test_values_that_the_type_cannot_hold(kind, value, make, tmp_path):
  model, params = make("llama")
  table = params["embedding"]["token_VD"]
  params = params | {"embedding": {"token_VD": table.at[3, 5].set(value)}}
  message = refusal(tmp_path / "model.gguf", model, params, TOKENIZER, kind)
  assert "tensor 'token_embd.weight' has values that are not finite or too large" in message
  assert not list(tmp_path.iterdir()), "neither a file nor half of one"


def test_q8_0_holds_what_f16_cannot(make, tmp_path):
  model, params = make("llama")
  table = params["embedding"]["token_VD"].at[3, 5].set(7e4)
  interop.write_file(
    tmp_path / "model.gguf", model, params | {"embedding": {"token_VD": table}}, TOKENIZER, "q8_0"
  )
  got = interop.open_weights(tmp_path / "model.gguf").read("model.embed_tokens.weight")
  assert abs(got[3, 5] / 7e4 - 1) < 1e-3


def test_disk_that_cannot_be_written(make, tmp_path, monkeypatch):
  model, params = make("llama")
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot write .*file/model.gguf: "):
    interop.write_file(tmp_path / "file" / "model.gguf", model, params, TOKENIZER)

  def full(*args):
    raise OSError("No space left on device")

  monkeypatch.setattr(gguf_export.gguf.GGUFWriter, "write_tensor_data", full)
  with pytest.raises(errors.UserError, match="cannot write .*model.gguf: No space left"):
    interop.write_file(tmp_path / "model.gguf", model, params, TOKENIZER)
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
