"""Translates Hugging Face's config.json to NetworkConfig and back, for the architectures that both can describe.

Called by the package's own `describe`, by huggingface.py and by gguf_export.py; gguf_file.py brings a GGUF file's
metadata into this form. Knows no tensors. It reads the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and
that of transformers 5 (`rope_parameters`). It writes the first, which both versions read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from absl import logging

from instructjax.core.config import NetworkConfig, RopeScalingConfig
from instructjax.core.errors import UserError

# Keys of our own in an exported config.json.
SCORE_BIAS = "instructjax_score_bias"  # Hugging Face's score heads have no bias
PAD_ROW = "instructjax_pad_row"  # the export has added a last row to the embedding, for a pad token

_LM = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
_LM |= {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_BARE = {
  "gpt2": "GPT2Model",
  "llama": "LlamaModel",
  "mistral": "MistralModel",
  "qwen2": "Qwen2Model",
}
_SCALAR = {
  family: f"{name.removesuffix('Model')}ForSequenceClassification" for family, name in _BARE.items()
}


@dataclasses.dataclass(frozen=True)
class Description:
  """The network that a file's config describes.

  Attributes:
    cfg: the network; how it is run is up to the caller.
    vocab_size: number of ids that the embedding table has rows for, without a pad row that an export added.
    head: 'lm', or 'scalar' for a model that scores sequences.
  """

  cfg: NetworkConfig
  vocab_size: int
  head: Literal["lm", "scalar"]


def model_config(raw: Mapping[str, Any], where: str) -> Description:
  """The network that a config.json describes.

  A field that the architecture does not use gets the value of configs/base.py, so that one network has one description.

  Args:
    raw: the parsed file.
    where: its path, for errors.
  Raises:
    UserError: the architecture is not known, or has a switch that NetworkConfig lacks; or a key is missing or no
      sensible value.
  """
  keys = _Keys(raw, where)
  family = keys.one_of("model_type", tuple(_LM))
  keys.refuse("quantization_config", None)
  fields = _gpt2_fields(keys) if family == "gpt2" else _llama_fields(keys, family)
  cfg = NetworkConfig(
    **fields,
    qkv_bias=family == "qwen2",
    attention_window=0,
    init_std=keys.number("initializer_range", 0.02),
  )
  cfg.rope_scaling.validate(f"{where}: rope_scaling")
  cfg.validate(where)
  rows = keys.size("vocab_size", None)
  return Description(cfg, rows - 1 if PAD_ROW in raw else rows, _head(keys, family))


def _head(keys: "_Keys", family: str) -> Literal["lm", "scalar"]:
  """The head by the name of transformers' class; UserError for a classifier with several labels or another class."""
  classes = keys.value("architectures", None) or [_LM[family]]
  if classes[0] in (_LM[family], _BARE[family]):
    return "lm"
  if classes[0] != _SCALAR[family]:
    raise UserError(
      f"{keys.where}: architectures={classes} must be {_LM[family]} or {_SCALAR[family]}"
    )
  labels = keys.value("id2label", None)
  # transformers does not write its default, which is two labels. So a missing count is two, and is refused.
  count = len(labels) if labels is not None else keys.size("num_labels", 2)
  if count != 1:
    raise UserError(f"{keys.where}: num_labels={count} must be 1: one score a sequence")
  return "scalar"


def _gpt2_fields(keys: "_Keys") -> dict:
  """NetworkConfig's fields for GPT-2. The defaults for missing keys are those of transformers' GPT2Config."""
  keys.one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
  keys.refuse("scale_attn_weights", True)
  keys.refuse("scale_attn_by_inverse_layer_idx", False)
  keys.refuse("add_cross_attention", False)
  width, heads = keys.size("n_embd", 768), keys.size("n_head", 12)
  if width % heads:
    raise UserError(f"{keys.where}: n_embd={width} must be a multiple of n_head={heads}")
  return dict(
    num_layers=keys.size("n_layer", 12),
    d_model=width,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    d_mlp=keys.size("n_inner", 4 * width),
    max_length=keys.size("n_positions", 1024),
    position="learned",
    rope_base=10_000.0,
    rope_scaling=_NO_SCALING,
    norm="layernorm",
    norm_eps=keys.number("layer_norm_epsilon", 1e-5),
    mlp="gelu",
    use_bias=True,
    tie_embeddings=keys.flag("tie_word_embeddings", True),
  )


# No field but the first has a meaning here. They are those of configs/base.py, so that descriptions compare equal.
_NO_SCALING = RopeScalingConfig("none", 8.0, 1.0, 4.0, 8192)


def _llama_fields(keys: "_Keys", family: str) -> dict:
  """NetworkConfig's fields for Llama, Mistral or Qwen2."""
  keys.one_of("hidden_act", ("silu", "swish"), "silu")
  width, heads = keys.size("hidden_size", None), keys.size("num_attention_heads", None)
  bias = [family == "llama" and keys.flag(name, False) for name in ("attention_bias", "mlp_bias")]
  if bias[0] != bias[1]:
    raise UserError(
      f"{keys.where}: attention_bias={bias[0]} and mlp_bias={bias[1]} must be equal: biases on every"
      " projection or on none"
    )
  if not keys.value("head_dim", None) and width % heads:
    raise UserError(
      f"{keys.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}"
    )
  base, scaling = _rope(keys)
  return dict(
    num_layers=keys.size("num_hidden_layers", None),
    d_model=width,
    num_heads=heads,
    # If the key is missing, transformers takes num_attention_heads for Llama, but a fixed number for Mistral and Qwen2.
    # A fixed number fits few models, so these two must have the key.
    num_kv_heads=keys.size("num_key_value_heads", heads if family == "llama" else None),
    head_dim=keys.size("head_dim", width // heads),
    d_mlp=keys.size("intermediate_size", None),
    max_length=_max_length(keys, family),
    position="rope",
    rope_base=base,
    rope_scaling=scaling,
    norm="rmsnorm",
    norm_eps=keys.number("rms_norm_eps", 1e-6),
    mlp="swiglu",
    use_bias=bias[0],
    tie_embeddings=keys.flag("tie_word_embeddings", False),
  )


def _max_length(keys: "_Keys", family: str) -> int:
  """The longest context in which every layer attends to all tokens, since NetworkConfig has no such sliding window.

  Raises:
    UserError: some layers have a window and others have none.
  """
  length = keys.size("max_position_embeddings", None)
  if family == "qwen2":
    keys.refuse("use_sliding_window", False)
  kinds = set(keys.value("layer_types", None) or ()) - {"full_attention"}
  if kinds and not (family == "mistral" and kinds == {"sliding_attention"}):
    raise UserError(f"{keys.where}: layer_types={sorted(kinds)} must be full_attention only")
  # For Mistral, null switches the window off, while a missing key means transformers' default of 4096.
  if family != "mistral" or ("sliding_window" in keys.raw and keys.raw["sliding_window"] is None):
    return length
  window = keys.size("sliding_window", 4096)
  if window < length:
    logging.warning(
      "%s: context of %d tokens cut to sliding_window=%d: up to there attention is dense",
      keys.where,
      length,
      window,
    )
  return min(length, window)


def _rope(keys: "_Keys") -> tuple[float, RopeScalingConfig]:
  """Base and scaling of rotary positions.

  transformers 5 has both in `rope_parameters`, transformers 4 has `rope_theta` and `rope_scaling`.
  """
  name = "rope_parameters" if keys.value("rope_parameters", None) else "rope_scaling"
  inner = _Keys(keys.value(name, None) or {}, f"{keys.where}: {name}")
  for part in (keys, inner):
    if part.number("partial_rotary_factor", 1.0) != 1:
      part.refuse("partial_rotary_factor", 1.0)
  base = inner.number("rope_theta", keys.number("rope_theta", 10_000.0))
  spelling = "rope_type" if "rope_type" in inner.raw else "type"  # older files say `type`
  kind = inner.one_of(spelling, ("default", "linear", "llama3"), "default")
  if kind == "default":
    return base, _NO_SCALING
  scaling = dataclasses.replace(_NO_SCALING, kind=kind, factor=inner.number("factor", None))
  if kind == "linear":
    return base, scaling
  length = keys.size("max_position_embeddings", None)
  return base, dataclasses.replace(
    scaling,
    low_freq_factor=inner.number("low_freq_factor", None),
    high_freq_factor=inner.number("high_freq_factor", None),
    original_length=inner.size("original_max_position_embeddings", length),
  )


class _Keys:
  """Reads a config's keys. A wrong value raises a UserError that names the file and the key.

  A key that is absent or null takes the default. The default None means that the key is required.
  """

  def __init__(self, raw: Mapping[str, Any], where: str):
    if not isinstance(raw, Mapping):
      raise UserError(f"{where}: {raw!r} must be a JSON object")
    self.raw, self.where = raw, where

  def value(self, name: str, default):
    found = self.raw.get(name)
    return default if found is None else found

  def size(self, name: str, default: int | None) -> int:
    found = self._needed(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
      raise UserError(f"{self.where}: {name}={found!r} must be a positive whole number")
    return found

  def number(self, name: str, default: float | None) -> float:
    found = self._needed(name, default)
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
      raise UserError(f"{self.where}: {name}={found!r} must be a number")
    return float(found)

  def flag(self, name: str, default: bool) -> bool:
    found = self.value(name, default)
    if not isinstance(found, bool):
      raise UserError(f"{self.where}: {name}={found!r} must be true or false")
    return found

  def one_of(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
    found = self._needed(name, default)
    if found not in known:
      raise UserError(f"{self.where}: {name}={found!r} is not supported; known: {', '.join(known)}")
    return found

  def refuse(self, name: str, only):
    """Raises UserError unless a switch is absent or has the only value that is supported."""
    found = self.value(name, only)
    if found != only:
      raise UserError(f"{self.where}: {name}={found!r} is not supported, only {only!r}")

  def _needed(self, name: str, default):
    found = self.value(name, default)
    if found is None:
      raise UserError(f"{self.where} lacks {name!r}")
    return found


# --- out ------------------------------------------------------------------------------------------


def to_hf_config(
  cfg: NetworkConfig, vocab_size: int, head: Literal["lm", "scalar"], score_bias: float = 0.0
) -> dict[str, Any]:
  """The config.json of a network.

  Args:
    cfg: the network.
    vocab_size: of the model. The file of a scalar head says one more, for the pad row.
    head: 'lm' or 'scalar'.
    score_bias: bias to be added to the scores by the reader, if the architecture has no tensor that could hold it.
  Raises:
    UserError: no architecture of Hugging Face matches the network; the message names the switch.
  """
  family = _family(cfg)
  result = {
    "model_type": family,
    "architectures": [(_LM if head == "lm" else _SCALAR)[family]],
    "vocab_size": vocab_size + (head == "scalar"),
    "tie_word_embeddings": cfg.tie_embeddings,
    "initializer_range": cfg.init_std,
    "torch_dtype": "float32",
    **(_gpt2_keys(cfg) if family == "gpt2" else _llama_keys(cfg)),
  }
  if head == "scalar":
    # transformers reads the score at the last token that is not a pad, so it needs a pad id. Our pad id, vocab_size, is
    # no token of the tokenizer, so no real token is taken for a pad (details item 2).
    result |= {"pad_token_id": vocab_size, PAD_ROW: True, SCORE_BIAS: score_bias}
    result |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
  return result


def _family(cfg: NetworkConfig) -> Literal["gpt2", "llama", "qwen2"]:
  """The architecture that a network is an instance of. Mistral is Llama, once its window is gone.

  Raises:
    UserError: there is none.
  """

  def require(condition: bool, message: str):
    if not condition:
      raise UserError(f"no Hugging Face architecture holds this model: {message}")

  shape = f"num_heads={cfg.num_heads}, num_kv_heads={cfg.num_kv_heads}, head_dim={cfg.head_dim}"
  require(
    not cfg.attention_window or cfg.max_length <= cfg.attention_window,
    f"attention_window={cfg.attention_window} (GPT-3's banded layers) must be 0 or reach over"
    f" max_length={cfg.max_length}",
  )
  if cfg.position == "learned":
    require(
      (cfg.norm, cfg.mlp, cfg.use_bias) == ("layernorm", "gelu", True),
      f"position='learned' must come with layernorm, gelu and biases (GPT-2), got norm={cfg.norm!r},"
      f" mlp={cfg.mlp!r}, use_bias={cfg.use_bias}",
    )
    require(
      cfg.num_kv_heads == cfg.num_heads and cfg.num_heads * cfg.head_dim == cfg.d_model,
      f"{shape} must be equal numbers of heads that fill d_model={cfg.d_model} (GPT-2)",
    )
    return "gpt2"
  require(
    (cfg.norm, cfg.mlp) == ("rmsnorm", "swiglu"),
    f"position='rope' must come with rmsnorm and swiglu (Llama), got norm={cfg.norm!r}, mlp={cfg.mlp!r}",
  )
  require(
    cfg.d_model % cfg.num_heads == 0,
    f"d_model={cfg.d_model} must be a multiple of num_heads={cfg.num_heads} (Llama)",
  )
  return "qwen2" if cfg.qkv_bias and not cfg.use_bias else "llama"


def _gpt2_keys(cfg: NetworkConfig) -> dict:
  return {
    "n_layer": cfg.num_layers,
    "n_embd": cfg.d_model,
    "n_head": cfg.num_heads,
    "n_inner": cfg.d_mlp,
    "n_positions": cfg.max_length,
    "layer_norm_epsilon": cfg.norm_eps,
    "activation_function": "gelu_new",
  }


def _llama_keys(cfg: NetworkConfig) -> dict:
  result = {
    "num_hidden_layers": cfg.num_layers,
    "hidden_size": cfg.d_model,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.d_mlp,
    "max_position_embeddings": cfg.max_length,
    "rms_norm_eps": cfg.norm_eps,
    "hidden_act": "silu",
    "rope_theta": cfg.rope_base,
    "rope_scaling": _scaling_keys(cfg.rope_scaling),
  }
  # Qwen2's config has no keys for biases: the architecture has them on queries, keys and values.
  if cfg.use_bias or not cfg.qkv_bias:
    result |= {"attention_bias": cfg.use_bias, "mlp_bias": cfg.use_bias}
  return result


def _scaling_keys(scaling: RopeScalingConfig) -> dict | None:
  if scaling.kind == "none":
    return None
  result = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    result |= {
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_length,
    }
  return result
