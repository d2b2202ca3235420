"""Translates Hugging Face's config.json to NetworkConfig and back, for the architectures that both can describe.

Called by the package's own `describe`, by huggingface.py and by gguf_export.py; gguf_file.py brings a GGUF file's
metadata into this form. rotary.py reads what concerns rotary positions. Knows no tensors.

Every key of a file is obeyed, or refused, or known to change no logits, or named in one line of the log.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from absl import logging

from instructjax.core.config import NetworkConfig
from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys, shown
from instructjax.core.stages import Head
from instructjax.models.interop import config_keys, rotary

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
  head: Head


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
  keys = Keys(raw, where)
  family = keys.one_of("model_type", tuple(_LM))
  config_keys.check(keys, family)
  fields = _gpt2_fields(keys) if family == "gpt2" else _llama_fields(keys, family)
  cfg = NetworkConfig(
    **fields,
    qkv_bias=family == "qwen2",
    attention_window=0,
    init_std=keys.number("initializer_range", 0.02),
  )
  cfg.rope_scaling.validate(f"{where}: rope_scaling")
  cfg.validate(where)
  keys.number(SCORE_BIAS, 0.0)
  rows = keys.size("vocab_size", None) - keys.flag(PAD_ROW, False)
  if rows < 1:
    raise keys.wrong("vocab_size", "must be above 1, since one row is the pad's")
  return Description(cfg, rows, _head(keys, family))


def _head(keys: Keys, family: str) -> Head:
  """The head by the name of transformers' class; UserError for a classifier with several labels or another class."""
  classes = keys.texts("architectures") or [_LM[family]]
  if classes[0] in (_LM[family], _BARE[family]):
    return "lm"
  if classes[0] != _SCALAR[family]:
    raise UserError(
      f"{keys.where}: architectures={shown(classes)} must be {_LM[family]} or {_SCALAR[family]}"
    )
  labels = keys.block("id2label")
  # transformers does not write its default, which is two labels. So a missing count is two, and is refused.
  count = len(labels.raw) if labels is not None else keys.size("num_labels", 2)
  if count != 1:
    raise UserError(f"{keys.where}: num_labels={count} must be 1: one score a sequence")
  return "scalar"


def _gpt2_fields(keys: Keys) -> dict:
  """NetworkConfig's fields for GPT-2. The defaults for missing keys are those of transformers' GPT2Config."""
  keys.one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
  # transformers knows the first four by other names too, and lets those win.
  size = lambda name, alias, default: _size_by_two_names(keys, name, alias, default)
  width, heads = size("n_embd", "hidden_size", 768), size("n_head", "num_attention_heads", 12)
  if width % heads:
    raise UserError(f"{keys.where}: n_embd={width} must be a multiple of n_head={heads}")
  rotary.refuse_any(keys)
  return dict(
    num_layers=size("n_layer", "num_hidden_layers", 12),
    d_model=width,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    d_mlp=keys.size("n_inner", 4 * width),
    max_length=size("n_positions", "max_position_embeddings", 1024),
    position="learned",
    rope_base=10_000.0,
    rope_scaling=rotary.NO_SCALING,
    norm="layernorm",
    norm_eps=_positive(keys, "layer_norm_epsilon", 1e-5),
    mlp="gelu",
    use_bias=True,
    tie_embeddings=keys.flag("tie_word_embeddings", True),
  )


def _positive(keys: Keys, name: str, default: float) -> float:
  found = keys.number(name, default)
  if found <= 0:
    raise keys.wrong(name, "must be above 0")
  return found


def _size_by_two_names(keys: Keys, name: str, alias: str, default: int) -> int:
  """A size that has two names; raises UserError if both are there and differ."""
  found = keys.size(name, keys.size(alias, default))
  if keys.size(alias, found) != found:
    raise keys.wrong(alias, f"contradicts {name}={found}: they are two names of one size")
  return found


def _llama_fields(keys: Keys, family: str) -> dict:
  """NetworkConfig's fields for Llama, Mistral or Qwen2."""
  keys.one_of("hidden_act", ("silu", "swish"), "silu")
  if family == "qwen2":
    keys.refuse("use_sliding_window", False)
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
  turning = rotary.from_config(keys)
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
    rope_base=turning.base,
    rope_scaling=turning.scaling,
    norm="rmsnorm",
    norm_eps=_positive(keys, "rms_norm_eps", 1e-6),
    mlp="swiglu",
    use_bias=bias[0],
    tie_embeddings=keys.flag("tie_word_embeddings", False),
  )


def _max_length(keys: Keys, family: str) -> int:
  """The longest context in which every layer attends to all tokens, since NetworkConfig has no such sliding window.

  Raises:
    UserError: some layers have a window and others have none.
  """
  length = keys.size("max_position_embeddings", None)
  kinds = keys.texts("layer_types")
  unlike = set(kinds) - {"full_attention"}
  if unlike and not (family == "mistral" and unlike == {"sliding_attention"}):
    raise UserError(
      f"{keys.where}: layer_types={shown(sorted(unlike))} must be full_attention only"
    )
  layers = keys.size("num_hidden_layers", None)
  if kinds and len(kinds) != layers:
    raise UserError(
      f"{keys.where}: layer_types has {len(kinds)} entries, and num_hidden_layers={layers}"
    )
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


# --- out ------------------------------------------------------------------------------------------


def to_hf_config(
  cfg: NetworkConfig, vocab_size: int, head: Head, score_bias: float = 0.0
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
    **rotary.to_config(rotary.Rotary(cfg.rope_base, cfg.rope_scaling)),
  }
  # Qwen2's config has no keys for biases: the architecture has them on queries, keys and values.
  if cfg.use_bias or not cfg.qkv_bias:
    result |= {"attention_bias": cfg.use_bias, "mlp_bias": cfg.use_bias}
  return result
