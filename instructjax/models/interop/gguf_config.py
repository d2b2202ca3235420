"""The config.json that a GGUF file's metadata stands for, for each architecture.

Called by gguf_file.py. Every key is obeyed, or refused, or known to change no logits, or named in one line of the log.
rotary_gguf.py reads what concerns rotary positions. Reads no tensor itself.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.foreign import shown
from instructjax.data import gguf_header
from instructjax.models.interop import gguf_names, rotary, rotary_gguf

Tensors = Mapping[str, gguf_header.Tensor]


class Keys:
  """Typed access to a file's metadata; every error names the file and the key."""

  def __init__(self, path: pathlib.Path, values: Mapping[str, Any]):
    self.path, self.values = path, values

  def get(self, key: str, kind: type, default: Any = None):
    """The value of a key, or `default` if the file does not have it.

    Raises:
      UserError: the value has another type, or it is missing and there is no default.
    """
    value = self.values.get(key, default)
    if value is None:
      raise UserError(f"{self.path}: metadata key {key!r} is missing")
    # `type`, not isinstance, below: a bool is an int to isinstance.
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise UserError(
        f"{self.path}: metadata key {key!r} must be one value of type {kind.__name__},"
        f" got {shown(value)}"
      )
    return value


def config(
  keys: Keys, name: str, tensors: Tensors, read_freqs: Callable[[gguf_header.Tensor], np.ndarray]
) -> dict[str, Any]:
  """The config.json of a file.

  Args:
    keys: the file's metadata.
    name: its architecture.
    tensors: its tensors' headers.
    read_freqs: reads the tensor of divisors of frequencies.
  Raises:
    UserError: a key is missing or has another type, or the network is not supported.
  """
  if name == "gpt2":
    return _gpt2(keys, tensors)
  if name == "gptneox":
    return _gptneox(keys, tensors)
  found = _llama(keys, name, tensors, read_freqs)
  if name == "smollm3":
    # No key tells which layers have no positions: llama.cpp has it built in.
    return found | {"no_rope_layers": None, "no_rope_layer_interval": 4}
  return found | _gemma3(keys, found) if name == "gemma3" else found


def _llama(
  keys: Keys, name: str, tensors: Tensors, read_freqs: Callable[[gguf_header.Tensor], np.ndarray]
) -> dict:
  """The config.json of architecture `llama` (Llama and Mistral), and what those like it share.

  Raises:
    UserError: a key is missing or has another type, or the network is not supported.
  """
  get = lambda key, kind, default=None: keys.get(f"{name}.{key}", kind, default)
  num_heads, width = get("attention.head_count", int), get("embedding_length", int)
  if not 0 < num_heads <= width:
    raise UserError(
      f"{keys.path}: {name}.attention.head_count={num_heads} must be positive and at most"
      f" {name}.embedding_length={width}"
    )
  head_dim = get("attention.key_length", int, width // num_heads)
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key, int, head_dim) != head_dim:
      raise UserError(
        f"{keys.path}: {name}.{key}={get(key, int)} must equal the width of a head, {head_dim}"
        f" ({name}.attention.key_length): heads that are rotated in part are not supported"
      )
  freqs = tensors.get(gguf_names.ROPE_FREQS) if name == "llama" else None
  read = None
  if freqs is not None:
    # A tensor of another shape is not read, and refused where its numbers are looked at.
    fits = freqs.shape == (head_dim // 2,)
    read = functools.partial(read_freqs, freqs) if fits else lambda: np.empty(0, np.float32)
  turning = rotary_gguf.from_gguf(get, keys.values, name, str(keys.path), head_dim, read)
  # In GGUF Mistral is no architecture of its own, but a `llama` with a sliding window.
  window, length = get("attention.sliding_window", int, 0), get("context_length", int)
  if window and name not in ("llama", "gemma3"):
    if window < length:
      raise UserError(
        f"{keys.path}: {name}.attention.sliding_window={window} must reach over"
        f" {name}.context_length={length}"
      )
    window = 0
  result = {
    "model_type": "mistral" if window and name == "llama" else family_of(name),
    "vocab_size": get("vocab_size", int, _vocab_size(keys, tensors)),
    "hidden_size": width,
    "intermediate_size": get("feed_forward_length", int),
    "num_hidden_layers": get("block_count", int),
    "num_attention_heads": num_heads,
    "num_key_value_heads": get("attention.head_count_kv", int, num_heads),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": length,
    "rms_norm_eps": gguf_names.decimal(get("attention.layer_norm_rms_epsilon", float)),
    **rotary.to_config(turning, family_of(name)),
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  if window:
    result["sliding_window"] = window
  # GGUF has no key for biases: they are there or not. Qwen2 has them on queries, keys and values by definition.
  if name in ("llama", "smollm3"):
    result["attention_bias"] = "blk.0.attn_q.bias" in tensors
    result["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
  return result


def _gpt2(keys: Keys, tensors: Tensors) -> dict:
  """The config.json of architecture `gpt2`; raises UserError for a missing key or one of another type."""
  get = lambda key, kind: keys.get(f"gpt2.{key}", kind)
  return {
    "model_type": "gpt2",
    "vocab_size": _vocab_size(keys, tensors),
    "n_positions": get("context_length", int),
    "n_embd": get("embedding_length", int),
    "n_layer": get("block_count", int),
    "n_head": get("attention.head_count", int),
    "n_inner": get("feed_forward_length", int),
    "activation_function": "gelu_new",
    "layer_norm_epsilon": gguf_names.decimal(get("attention.layer_norm_epsilon", float)),
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def family_of(name: str) -> str:
  """Hugging Face's model_type of an architecture."""
  return {ours: theirs for theirs, ours in gguf_names.OF_FAMILY.items()}.get(name, name)


def _gemma3(keys: Keys, found: dict) -> dict:
  """What Gemma 3's config.json has besides; llama.cpp has most of it built in."""
  get = lambda key, kind, default=None: keys.get(f"gemma3.{key}", kind, default)
  width, heads = found["hidden_size"], found["num_attention_heads"]
  del found["hidden_act"]
  return {
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": get("attention.sliding_window", int),
    "sliding_window_pattern": get(
      "attention.sliding_window_pattern", int, len(gguf_names.GEMMA3_PATTERN)
    ),
    "query_pre_attn_scalar": gguf_names.gemma3_scalar(
      found["num_hidden_layers"], width, heads, found["head_dim"]
    ),
  }


def _gptneox(keys: Keys, tensors: Tensors) -> dict:
  """The config.json of architecture `gptneox`. llama.cpp computes its exact gelu by the tanh approximation."""
  get = lambda key, kind, default=None: keys.get(f"gptneox.{key}", kind, default)
  heads, width = get("attention.head_count", int), get("embedding_length", int)
  if not 0 < heads <= width or width % heads:
    raise UserError(
      f"{keys.path}: gptneox.attention.head_count={heads} must be positive and divide"
      f" gptneox.embedding_length={width}"
    )
  head_dim = width // heads
  turning_dim = get("rope.dimension_count", int, head_dim)
  if not 0 < turning_dim <= head_dim:
    raise UserError(
      f"{keys.path}: gptneox.rope.dimension_count={turning_dim} must be positive and at most the width"
      f" of a head, {head_dim}"
    )
  turning = rotary_gguf.from_gguf(get, keys.values, "gptneox", str(keys.path), turning_dim, None)
  share = rotary.share_of(turning_dim, head_dim)
  return {
    "model_type": "gpt_neox",
    "vocab_size": _vocab_size(keys, tensors),
    "max_position_embeddings": get("context_length", int),
    "hidden_size": width,
    "num_hidden_layers": get("block_count", int),
    "num_attention_heads": heads,
    "intermediate_size": get("feed_forward_length", int),
    "hidden_act": "gelu",
    "use_parallel_residual": get("use_parallel_residual", bool),
    "layer_norm_eps": gguf_names.decimal(get("attention.layer_norm_epsilon", float)),
    **rotary.to_config(dataclasses.replace(turning, share=share), "gpt_neox"),
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def _vocab_size(keys: Keys, tensors: Tensors) -> int:
  """Rows of the embedding table; raises UserError if there is none."""
  if "token_embd.weight" not in tensors:
    raise UserError(f"{keys.path}: tensor 'token_embd.weight' is missing")
  return tensors["token_embd.weight"].shape[0]


# Metadata keys without the architecture, which is their first part. rotary_gguf.py judges those of `rope.`.
_READ = {
  *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
  *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
  *("attention.layer_norm_epsilon", "attention.key_length", "attention.value_length"),
  *("attention.sliding_window", "expert_count"),
}
# Keys that one architecture has besides.
_READ_IN = {
  "gptneox": ("use_parallel_residual",),
  "gemma3": ("attention.sliding_window_pattern",),
}
# Keys by which llama.cpp computes something else -> the values with which they change nothing.
_MUST_BE = {
  "expert_count": (0,),
  "expert_used_count": (0,),
  "use_parallel_residual": (False,),
  "attention.causal": (True,),
  "attention.clamp_kqv": (0,),
  "attention.max_alibi_bias": (0,),
  "attention.scale": (0,),
  "attn_logit_softcapping": (0,),
  "final_logit_softcapping": (0,),
  "logit_scale": (0, 1),
  "embedding_scale": (0, 1),
  "residual_scale": (0, 1),
}
_HARMLESS = {"tensor_data_layout"}  # a note of the converter's


def unread_keys(keys: Keys, name: str) -> list[str]:
  """The architecture's keys that nothing reads; those that would change the logits are refused.

  Raises:
    UserError: a key of `_MUST_BE` has another value.
  """
  unread = []
  for key, value in keys.values.items():
    part = key.removeprefix(f"{name}.")
    if part == key or part.startswith("rope."):
      continue
    if part in _READ_IN.get(name, ()):
      continue
    if part in _MUST_BE and not any(value == allowed for allowed in _MUST_BE[part]):
      only = " or ".join(map(repr, _MUST_BE[part]))
      raise UserError(f"{keys.path}: {key}={shown(value)} is not supported, only {only}")
    if part not in (*_READ, *_MUST_BE, *_HARMLESS):
      unread.append(key)
  return unread
