"""Reading GGUF: quantizations, names, layouts, metadata, and every file that must be refused.

Files are made with the `gguf` package, as llama.cpp's converter makes them, not with our writer.
"""

import tracemalloc

import gguf
import numpy as np
import pytest

from instructjax.models.interop import gguf_file

LLAMA = {
  "llama.block_count": 1,
  "llama.context_length": 64,
  "llama.embedding_length": 8,
  "llama.feed_forward_length": 12,
  "llama.attention.head_count": 2,
  "llama.attention.head_count_kv": 1,
  "llama.attention.layer_norm_rms_epsilon": 1e-5,
  "llama.rope.dimension_count": 4,
  "llama.rope.freq_base": 500.0,
}
QWEN2 = {key.replace("llama", "qwen2"): value for key, value in LLAMA.items()}
GPT2 = {
  "gpt2.block_count": 1,
  "gpt2.context_length": 10,
  "gpt2.embedding_length": 8,
  "gpt2.feed_forward_length": 32,
  "gpt2.attention.head_count": 2,
  "gpt2.attention.layer_norm_epsilon": 1e-5,
}
TABLE = {"token_embd.weight": np.arange(40, dtype=np.float32).reshape(5, 8)}


@pytest.fixture
def write(tmp_path):
  """write(arch, metadata, tensors): a file; a tensor is an array, or (bytes [rows, n], type)."""

  def one(arch, metadata, tensors, name="model.gguf"):
    writer = gguf.GGUFWriter(tmp_path / name, arch)
    for key, value in metadata.items():
      kinds = {
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
      }
      writer.add_key_value(key, value, kinds[type(value)])
    for name_, value in tensors.items():
      data, kind = value if isinstance(value, tuple) else (value, None)
      writer.add_tensor(name_, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / name

  return one


# --- quantizations: blocks as ggml-quants.c lays them out, taken apart one value at a time ---


def half(raw: bytes) -> float:
  return float(np.frombuffer(bytes(raw), np.float16)[0])


def q4_0(block):
  d, qs = half(block[:2]), block[2:]
  return [(q & 15) * d - 8 * d for q in qs] + [(q >> 4) * d - 8 * d for q in qs]


def q4_1(block):
  d, m, qs = half(block[:2]), half(block[2:4]), block[4:]
  return [(q & 15) * d + m for q in qs] + [(q >> 4) * d + m for q in qs]


def fifth_bits(raw: bytes) -> list[int]:
  number = int.from_bytes(raw, "little")
  return [(number >> i & 1) << 4 for i in range(32)]


def q5_0(block):
  d, high, qs = half(block[:2]), fifth_bits(block[2:6]), block[6:]
  low = [q & 15 for q in qs] + [q >> 4 for q in qs]
  return [d * (a + b - 16) for a, b in zip(low, high)]


def q5_1(block):
  d, m, high, qs = half(block[:2]), half(block[2:4]), fifth_bits(block[4:8]), block[8:]
  low = [q & 15 for q in qs] + [q >> 4 for q in qs]
  return [d * (a + b) + m for a, b in zip(low, high)]


def q8_0(block):
  d = half(block[:2])
  return [d * (q - 256 if q > 127 else q) for q in block[2:]]


def scale_min(scales, j):
  """Six-bit scale and minimum number j of eight, packed into twelve bytes."""
  if j < 4:
    return scales[j] & 63, scales[j + 4] & 63
  low, high = scales[j + 4], (scales[j - 4] >> 6, scales[j] >> 6)
  return low & 15 | high[0] << 4, low >> 4 | high[1] << 4


def q4_k(block):
  d, dmin, scales, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
  values = []
  for j in range(8):
    scale, minimum = scale_min(scales, j)
    part = qs[j // 2 * 32 : j // 2 * 32 + 32]
    values += [d * scale * (q >> 4 if j % 2 else q & 15) - dmin * minimum for q in part]
  return values


def q5_k(block):
  d, dmin, scales = half(block[:2]), half(block[2:4]), block[4:16]
  high, qs = block[16:48], block[48:]
  values = []
  for j in range(8):
    scale, minimum = scale_min(scales, j)
    for i in range(32):
      q = qs[j // 2 * 32 + i]
      q = (q >> 4 if j % 2 else q & 15) + (16 if high[i] >> j & 1 else 0)
      values.append(d * scale * q - dmin * minimum)
  return values


def q6_k(block):
  ql, qh, scales, d = block[:128], block[128:192], block[192:208], half(block[208:])
  values = [0.0] * 256
  for n in range(2):
    for i in range(128):
      quarter, column = divmod(i, 32)
      low = ql[64 * n + 32 * (quarter % 2) + column]
      low = low >> 4 if quarter > 1 else low & 15
      q = (low | (qh[32 * n + column] >> 2 * quarter & 3) << 4) - 32
      scale = scales[8 * n + i // 16]
      values[128 * n + i] = d * (scale - 256 if scale > 127 else scale) * q
  return values


# type -> (values a block, bytes a block, where float16 scales stand, the block's values)
QUANTIZED = {
  "Q4_0": (32, 18, (0,), q4_0),
  "Q4_1": (32, 20, (0, 2), q4_1),
  "Q5_0": (32, 22, (0,), q5_0),
  "Q5_1": (32, 24, (0, 2), q5_1),
  "Q8_0": (32, 34, (0,), q8_0),
  "Q4_K": (256, 144, (0, 2), q4_k),
  "Q5_K": (256, 176, (0, 2), q5_k),
  "Q6_K": (256, 210, (208,), q6_k),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_blocks_equal_a_loop_over_their_values(kind, write, monkeypatch):
  size, num_bytes, scales, values = QUANTIZED[kind]
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (5 * 256 // size, num_bytes), np.uint8)
  for at in scales:
    blocks[:, at : at + 2] = rng.normal(0, 0.1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
  tensor = blocks.reshape(5, -1), gguf.GGMLQuantizationType[kind]
  path = write("llama", LLAMA, {"token_embd.weight": tensor})
  monkeypatch.setattr(gguf_file, "_CHUNK", 600)  # two rows at a time, then the fifth
  got = gguf_file.open_file(path).read("model.embed_tokens.weight")
  wanted = np.array([values(block.tolist()) for block in blocks]).reshape(5, 256)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


def test_q8_0_by_hand(write):
  # Scale 0.5 is the float16 0x3800; 1, -1, 127, -128 and 28 zeros follow.
  block = np.array([0x00, 0x38, 1, 255, 127, 128] + [0] * 28, np.uint8)
  tensor = block[None], gguf.GGMLQuantizationType.Q8_0
  source = gguf_file.open_file(write("llama", LLAMA, {"token_embd.weight": tensor}))
  got = source.read("model.embed_tokens.weight")
  assert got[0, :5].tolist() == [0.5, -0.5, 63.5, -64.0, 0.0]


def test_float_types(write):
  value = np.array([[1.0, -2.5, 3.140625, 0.0]], np.float32)  # exact in all three
  kinds = gguf.GGMLQuantizationType
  bfloat16 = (value.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
  tensors = {
    "token_embd.weight": value,
    "blk.0.ffn_up.weight": value.astype(np.float16),
    "blk.0.ffn_gate.weight": (bfloat16, kinds.BF16),
  }
  source = gguf_file.open_file(write("llama", LLAMA, tensors))
  for name in source.shapes:
    np.testing.assert_array_equal(source.read(name), value, strict=True)


def test_little_is_held_besides_the_tensor(write, monkeypatch):
  value = np.zeros((1024, 1024 // 32 * 34), np.uint8)
  tensor = value, gguf.GGMLQuantizationType.Q8_0
  source = gguf_file.open_file(write("llama", LLAMA, {"token_embd.weight": tensor}))
  monkeypatch.setattr(gguf_file, "_CHUNK", 1 << 15)  # in the proportion of a real table
  tracemalloc.start()
  read = source.read("model.embed_tokens.weight")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1.3 * read.nbytes


# --- names, layouts, config ---


def llama_tensors():
  value = lambda *shape: np.zeros(shape, np.float32)
  return {
    "token_embd.weight": value(5, 8),
    "output_norm.weight": value(8),
    "output.weight": value(5, 8),
    "blk.0.attn_norm.weight": value(8),
    "blk.0.attn_q.weight": value(8, 8),
    "blk.0.attn_k.weight": value(4, 8),
    "blk.0.attn_v.weight": value(4, 8),
    "blk.0.attn_output.weight": value(8, 8),
    "blk.0.ffn_norm.weight": value(8),
    "blk.0.ffn_gate.weight": value(12, 8),
    "blk.0.ffn_up.weight": value(12, 8),
    "blk.0.ffn_down.weight": value(8, 12),
  }


LLAMA_SHAPES = {
  "model.embed_tokens.weight": (5, 8),
  "model.norm.weight": (8,),
  "lm_head.weight": (5, 8),
  "model.layers.0.input_layernorm.weight": (8,),
  "model.layers.0.self_attn.q_proj.weight": (8, 8),
  "model.layers.0.self_attn.k_proj.weight": (4, 8),
  "model.layers.0.self_attn.v_proj.weight": (4, 8),
  "model.layers.0.self_attn.o_proj.weight": (8, 8),
  "model.layers.0.post_attention_layernorm.weight": (8,),
  "model.layers.0.mlp.gate_proj.weight": (12, 8),
  "model.layers.0.mlp.up_proj.weight": (12, 8),
  "model.layers.0.mlp.down_proj.weight": (8, 12),
}


def test_llama_names_and_config(write):
  source = gguf_file.open_file(write("llama", LLAMA, llama_tensors()))
  assert source.shapes == LLAMA_SHAPES
  assert source.config == {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,  # not the float32 nearest to it
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
  }


def test_what_a_llama_file_may_leave_out(write):
  metadata = dict(LLAMA)
  for key in ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count"):
    del metadata[f"llama.{key}"]
  tensors = llama_tensors()
  del tensors["output.weight"]
  config = gguf_file.open_file(write("llama", metadata, tensors)).config
  assert config["num_key_value_heads"] == 2 and config["head_dim"] == 4
  assert config["rope_theta"] == 10000.0 and config["tie_word_embeddings"]


def test_mistral_is_a_llama_with_a_window(write):
  metadata = LLAMA | {"llama.attention.sliding_window": 32}
  config = gguf_file.open_file(write("llama", metadata, TABLE)).config
  assert config["model_type"] == "mistral" and config["sliding_window"] == 32


def test_qwen2_has_biases_and_plain_rows(write):
  rows = np.arange(8, dtype=np.float32)
  tensors = {
    **TABLE,
    "blk.0.attn_q.weight": np.tile(rows[:, None], (1, 8)),
    "blk.0.attn_q.bias": rows,
  }
  source = gguf_file.open_file(write("qwen2", QWEN2, tensors))
  assert source.config["model_type"] == "qwen2"
  name = "model.layers.0.self_attn.q_proj"
  np.testing.assert_array_equal(source.read(f"{name}.weight")[:, 0], rows)
  np.testing.assert_array_equal(source.read(f"{name}.bias"), rows)


def test_rotary_rows_of_llama_are_put_back(write, monkeypatch):
  """Two heads of four: the file has each head's rows in the order 0, 2, 1, 3."""
  stored = np.array([0, 2, 1, 3, 4, 6, 5, 7], np.float32)
  tensors = {
    **TABLE,
    "blk.0.attn_q.weight": np.tile(stored[:, None], (1, 8)),
    "blk.0.attn_q.bias": stored,
    "blk.0.attn_k.weight": np.tile(stored[:4, None], (1, 8)),
    "blk.0.attn_v.weight": np.tile(stored[:4, None], (1, 8)),
  }
  path = write("llama", LLAMA, tensors)
  source = gguf_file.open_file(path)
  assert source.config["attention_bias"]
  for chunk in (1 << 20, 8):  # in one piece, and head by head
    monkeypatch.setattr(gguf_file, "_CHUNK", chunk)
    read = lambda name: source.read(f"model.layers.0.self_attn.{name}")
    np.testing.assert_array_equal(read("q_proj.weight")[:, 3], np.arange(8))
    np.testing.assert_array_equal(read("q_proj.bias"), np.arange(8))
    np.testing.assert_array_equal(read("k_proj.weight")[:, 7], np.arange(4))
    np.testing.assert_array_equal(read("v_proj.weight")[:, 0], stored[:4])


def test_gpt2_names_and_layout(write):
  rng = np.random.default_rng(0)
  value = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors = {
    "token_embd.weight": value(5, 8),
    "position_embd.weight": value(10, 8),
    "output_norm.weight": value(8),
    "output_norm.bias": value(8),
    "blk.0.attn_norm.weight": value(8),
    "blk.0.attn_norm.bias": value(8),
    "blk.0.attn_qkv.weight": value(24, 8),
    "blk.0.attn_qkv.bias": value(24),
    "blk.0.attn_output.weight": value(8, 8),
    "blk.0.attn_output.bias": value(8),
    "blk.0.ffn_norm.weight": value(8),
    "blk.0.ffn_norm.bias": value(8),
    "blk.0.ffn_up.weight": value(32, 8),
    "blk.0.ffn_up.bias": value(32),
    "blk.0.ffn_down.weight": value(8, 32),
    "blk.0.ffn_down.bias": value(8),
  }
  source = gguf_file.open_file(write("gpt2", GPT2, tensors))
  assert source.config == {
    "model_type": "gpt2",
    "vocab_size": 5,
    "n_positions": 10,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": 32,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
  }
  names = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
  }
  layer = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
  stored = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
  for hf, ours in zip(layer, stored):
    for suffix in ("weight", "bias"):
      names[f"transformer.h.0.{hf}.{suffix}"] = f"blk.0.{ours}.{suffix}"
  assert source.shapes.keys() == names.keys()
  for hf, ours in names.items():
    matrix = ".h.0." in hf and hf.endswith("weight")
    np.testing.assert_array_equal(source.read(hf), tensors[ours].T if matrix else tensors[ours])
    assert source.shapes[hf] == source.read(hf).shape


def test_gpt2_head_is_tied_where_it_is_a_copy(write):
  table = TABLE["token_embd.weight"]
  copied = gguf_file.open_file(write("gpt2", GPT2, {**TABLE, "output.weight": table}))
  assert copied.config["tie_word_embeddings"] and "lm_head.weight" not in copied.shapes
  other = table.copy()
  other[-1, -1] += 1
  untied = gguf_file.open_file(write("gpt2", GPT2, {**TABLE, "output.weight": other}))
  assert not untied.config["tie_word_embeddings"]
  np.testing.assert_array_equal(untied.read("lm_head.weight"), other)


def test_the_file_is_named_for_who_compares_weights(write):
  path = write("llama", LLAMA, TABLE)
  assert gguf_file.open_file(path).files == (path,)


# --- rotary scaling ---


def llama3_freqs(base, head_dim, factor):
  """As llama.cpp's converter computes rope_freqs.weight."""
  result = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * base ** (i / head_dim)
    if wavelength < 8192 / 4:
      result.append(1.0)
    elif wavelength > 8192:
      result.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / 3
      result.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(result, np.float32)


LLAMA3 = LLAMA | {
  "llama.attention.key_length": 32,
  "llama.rope.dimension_count": 32,
  "llama.rope.freq_base": 500000.0,
}


def test_llama3_scaling_from_its_divisors(write):
  freqs = llama3_freqs(500000.0, 32, 8.0)
  assert len(np.unique(freqs)) > 2, "the ramp between 1 and the factor is met"
  source = gguf_file.open_file(write("llama", LLAMA3, {**TABLE, "rope_freqs.weight": freqs}))
  assert source.config["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  assert source.shapes.keys() == {"model.embed_tokens.weight"}


def test_rope_freqs_of_ones_scale_nothing(write):
  tensors = {**TABLE, "rope_freqs.weight": np.ones(16, np.float32)}
  assert gguf_file.open_file(write("llama", LLAMA3, tensors)).config["rope_scaling"] is None


def test_linear_scaling(write):
  metadata = LLAMA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  config = gguf_file.open_file(write("llama", metadata, TABLE)).config
  assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


# --- what is refused ---


def without(metadata, key):
  return {name: value for name, value in metadata.items() if name != key}


REFUSED = {
  "architecture": ("bert", LLAMA, TABLE, "general.architecture='bert' must be one of llama"),
  "split": ("llama", LLAMA | {"split.count": 3}, TABLE, "one of 3 parts .* merge them"),
  "missing key": ("llama", without(LLAMA, "llama.block_count"), TABLE, "'llama.block_count' is mi"),
  "gpt2's key": ("gpt2", without(GPT2, "gpt2.context_length"), TABLE, "'gpt2.context_length' is"),
  "type of a key": (
    "llama",
    LLAMA | {"llama.block_count": "x"},
    TABLE,
    "block_count' must be one ",
  ),
  "heads by layer": (
    *("llama", LLAMA | {"llama.attention.head_count": [2, 2]}, TABLE),
    "'llama.attention.head_count' must be one value of type int",
  ),
  "experts": ("llama", LLAMA | {"llama.expert_count": 8}, TABLE, "expert_count=8 is not supported"),
  "partial rotary": (
    *("llama", LLAMA | {"llama.attention.key_length": 8}, TABLE),
    "dimension_count=4 must equal the width of a head, 8",
  ),
  "longrope": (
    *("llama", LLAMA | {"llama.rope.scaling.type": "longrope"}, TABLE),
    "type='longrope' is not supp",
  ),
  "no table": (
    "llama",
    LLAMA,
    {"output_norm.weight": np.ones(8, "f4")},
    "'token_embd.weight' is missi",
  ),
  "quantization": (
    *("llama", LLAMA),
    {"token_embd.weight": (np.zeros((1, 84), np.uint8), gguf.GGMLQuantizationType.Q2_K)},
    "'token_embd.weight' has quantization Q2_K; one of F32",
  ),
  "unknown tensor": (
    *("llama", LLAMA, {**TABLE, "blk.0.ffn_gate_inp.weight": np.ones((2, 8), np.float32)}),
    "'blk.0.ffn_gate_inp.weight' of shape .2, 8. is none of architecture 'llama'",
  ),
  "unknown ending": (
    *("llama", LLAMA, {**TABLE, "blk.0.attn_q.scale": np.ones(1, np.float32)}),
    "'blk.0.attn_q.scale'",
  ),
  "rank": (
    *("llama", LLAMA, {**TABLE, "blk.0.ffn_up.weight": np.ones((2, 2, 8), np.float32)}),
    "'blk.0.ffn_up.weight' of shape .2, 2, 8.",
  ),
  "half a head": (
    *("llama", LLAMA, {**TABLE, "blk.0.attn_q.weight": np.ones((6, 8), np.float32)}),
    "'blk.0.attn_q.weight' of shape .6, 8. must have rows of whole heads of 4",
  ),
  "rope_freqs": (
    *("llama", LLAMA3),
    {**TABLE, "rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)},
    "'rope_freqs.weight' must be Llama 3's rotary scaling",
  ),
  "two scalings": (
    *("llama", LLAMA3 | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    {**TABLE, "rope_freqs.weight": np.ones(16, np.float32)},
    r"factor=4 .linear. and tensor 'rope_freqs.weight' are two rotary scalings",
  ),
  "rope_freqs of GPT-2": (
    *("gpt2", GPT2, {**TABLE, "rope_freqs.weight": np.ones(2, np.float32)}),
    "'rope_freqs.weight' of shape .2,. is none of architecture 'gpt2'",
  ),
  "rope_freqs' size": (
    *("llama", LLAMA3, {**TABLE, "rope_freqs.weight": np.ones(8, np.float32)}),
    "'rope_freqs.weight' must be",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, write):
  arch, metadata, tensors, message = REFUSED[case]
  path = write(arch, metadata, tensors)
  with pytest.raises(ValueError, match=message) as caught:
    gguf_file.open_file(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_file_cut_off_after_it_was_opened(write):
  path = write("llama", LLAMA, TABLE)
  source = gguf_file.open_file(path)
  with path.open("r+b") as file:
    file.truncate(path.stat().st_size - 40)
  with pytest.raises(ValueError, match="model.gguf was cut off while tensor 'token_embd.weight'"):
    source.read("model.embed_tokens.weight")
