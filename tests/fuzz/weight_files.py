"""Damaged and hostile weights: config.json, index, safetensors header, GGUF header; and what opening them must do."""

import functools
import json
import pathlib
import random
import tempfile
from collections.abc import Iterator

import gguf
import numpy as np

from instructjax.core.errors import UserError
from instructjax.models import interop
from instructjax.models.interop import hf_config, huggingface, tensor_table
from tests.fuzz import mutants
from tests.fuzz.mutants import Files

_SIZES = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "vocab_size": 5}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "beta_slow": 1.0,
  "beta_fast": 32.0,
  "mscale": 1.0,
  "mscale_all_dim": 0.5,
  "original_max_position_embeddings": 8,
}
CONFIGS = {
  "gpt2": {"vocab_size": 5, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
  "llama": _SIZES | {"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 8}},
  "mistral": _SIZES | {"sliding_window": 8, "rope_theta": 1e4},
  "qwen2": _SIZES
  | {
    "rope_parameters": _YARN | {"rope_theta": 1e6},
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
  },
  "gpt_neox": _SIZES | {"rotary_pct": 0.5, "rotary_emb_base": 1e4, "use_parallel_residual": True},
  "smollm3": _SIZES | {"no_rope_layers": [1, 0]},
  "gemma3_text": _SIZES
  | {
    "head_dim": 4,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  },
}
# Keys that some file has and these do not.
KEYS = (
  *(
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rope_type",
    "partial_rotary_factor",
    "factor",
  ),
  *("rotary_pct", "rotary_emb_base", "rope_local_base_freq", "no_rope_layers", "hidden_activation"),
  *("no_rope_layer_interval", "sliding_window_pattern", "query_pre_attn_scalar"),
  *("original_max_position_embeddings", "layer_types", "head_dim", "architectures", "id2label"),
  *("num_labels", "quantization_config", "use_sliding_window", "sliding_window", "torch_dtype"),
  *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps", "n_inner"),
  *(
    "instructjax_pad_row",
    "instructjax_score_bias",
    "weight_map",
    "__metadata__",
    "",
    "\n\x1b[31m",
  ),
)
# Numbers for the fields of a binary header.
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)


# --- whole files ----------------------------------------------------------------------------------


@functools.cache
def seeds() -> dict[str, Files]:
  """Folders that open, by name."""
  result = {}
  for family, sizes in CONFIGS.items():
    config = {"model_type": family} | sizes
    found = hf_config.model_config(config, family)
    tensors = tensor_table.listed(found.cfg, found.vocab_size, "lm")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    folder = {"config.json": json.dumps(config).encode()}
    result[family] = folder | {"model.safetensors": _safetensors(shapes)}
    names = list(shapes)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    weight_map = {name: file for file, held in halves.items() for name in held}
    result[f"{family} in shards"] = folder | {
      "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
      **{
        file: _safetensors({name: shapes[name] for name in held}) for file, held in halves.items()
      },
    }
  result["gguf"] = {"model.gguf": _gguf()}
  return result


def _safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "x"
    zeros = [
      (name, shape, lambda shape=shape: np.ones(shape, "f4")) for name, shape in shapes.items()
    ]
    huggingface.write_safetensors(path, zeros)
    return path.read_bytes()


def _gguf() -> bytes:
  """A Llama with rotary settings, as llama.cpp's converter writes it, and some of a tokenizer."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "x"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "</s>", "d", "e"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0, 3.0, 4.0])
    parts = ["attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
    parts += ["ffn_gate", "ffn_up", "ffn_down"]
    names = ["token_embd", "output_norm", *(f"blk.0.{part}" for part in parts)]
    for name in names:
      rows = {"token_embd": (5,)}.get(name, () if "norm" in name else (32,))
      writer.add_tensor(f"{name}.weight", np.ones((*rows, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# --- mutants --------------------------------------------------------------------------------------


def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
  """Yields (what it is, the files of a folder, one of them damaged) without end."""
  while True:
    name, files = rng.choice(list(seeds().items()))
    file = rng.choice(list(files))
    mutant = files[file]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
      mutant = mutate(rng, mutant, file)
    yield f"{name}: {file}", files | {file: mutant}


def mutate(rng: random.Random, valid: bytes, file: str) -> bytes:
  """A mutant of a file, of the kind that its name says."""
  if rng.random() < 0.15:
    return mutants.damaged(rng, valid)
  if file.endswith(".json"):
    return mutants.json_text(rng, valid, KEYS)
  return _header(rng, valid) if file.endswith(".safetensors") else _binary(rng, valid)


def _header(rng: random.Random, valid: bytes) -> bytes:
  """A safetensors file with another header, or another length of it."""
  size = int.from_bytes(valid[:8], "little")
  header, data = valid[8 : 8 + size], valid[8 + size :]
  if rng.random() < 0.15:
    return (rng.choice((*NUMBERS, size + 1, size - 1, len(valid))) % 2**64).to_bytes(
      8, "little"
    ) + valid[8:]
  if rng.random() < 0.5:
    header = _numbers(rng, header)
  else:
    header = mutants.json_text(rng, header, KEYS)
  return len(header).to_bytes(8, "little") + header + data


def _numbers(rng: random.Random, header: bytes) -> bytes:
  """Another shape, dtype or offset of one tensor."""
  try:
    tree = json.loads(header)
    entry = rng.choice([value for value in tree.values() if "shape" in value])
    number = rng.choice((0, 1, 2, 5, 8, 40, 160, -1, 2**31, 2**62, 2**64, 1.5))
    what = rng.choice(("shape", "data_offsets"))
    if rng.random() < 0.2:
      entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "X", 3))
    elif rng.random() < 0.2:
      entry[what] = [number] * rng.choice((0, 1, 3, 2000))
    else:
      entry[what][rng.randrange(len(entry[what]))] = number
  except (ValueError, TypeError, AttributeError, IndexError, RecursionError, KeyError):
    return mutants.damaged(rng, header)
  return json.dumps(tree).encode()


def _binary(rng: random.Random, valid: bytes) -> bytes:
  """A GGUF file with another number somewhere in its header."""
  width, at = rng.choice((1, 4, 8)), rng.randrange(min(len(valid), 1700) or 1)
  number = rng.choice((*NUMBERS, rng.randrange(256), rng.randrange(20)))
  return valid[:at] + (number % 256**width).to_bytes(width, "little") + valid[at + width :]


# --- what is tried --------------------------------------------------------------------------------


def run(folder: pathlib.Path):
  """Opens the weights in a folder and reads all tensors.

  Raises:
    UserError: they are refused.
    AssertionError: a tensor has another shape than was said, or a refusal names no file.
  """
  path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
  try:
    source = interop.open_weights(path)
    interop.describe(source)
    for name, shape in source.shapes.items():
      assert source.read(name).shape == tuple(shape)
  except UserError as error:
    assert str(folder) in str(error), f"names no file: {error}"
    raise
