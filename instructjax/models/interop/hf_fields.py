"""NetworkConfig's fields from the keys of Hugging Face's config.json, for each architecture.

Called by hf_config.py, which makes the network of them. Every key is obeyed or refused here, or sorted by
config_keys.py. Defaults for missing keys are those of transformers' classes. Knows no tensors.
"""

from typing import Any

from absl import logging

from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys, shown
from instructjax.models.interop import rotary
from instructjax.models.positions import shortest_pattern

# Fields that an architecture does not use have the values of configs/base.py, so that one network has one description.
_NEUTRAL = dict(
  rope_local_base=0.0,
  rotary_dim=0,
  sandwich_norm=False,
  qk_norm=False,
  parallel_residual=False,
  qkv_bias=False,
  attention_window=0,
  layer_pattern="GL",
  query_pre_attn_scalar=0,
  scale_embeddings=False,
)
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # both of transformers' names are one function


def fields(keys: Keys, family: str) -> dict[str, Any]:
  """All fields of a NetworkConfig but `init_std`.

  Args:
    keys: of config.json.
    family: its model_type.
  Raises:
    UserError: a key is missing, no sensible value, or a switch that NetworkConfig lacks.
  """
  if family == "gpt2":
    return _NEUTRAL | _gpt2(keys)
  if family == "gpt_neox":
    return _NEUTRAL | _gpt_neox(keys)
  own = {"qwen2": _qwen2, "qwen3": _qwen3, "smollm3": _smollm3, "gemma3_text": _gemma3}
  found = _NEUTRAL | _llama(keys, family)
  return found | own[family](keys, found) if family in own else found


def _gpt2(keys: Keys) -> dict:
  keys.one_of("activation_function", TANH_GELU, TANH_GELU[0])
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


def _width_and_heads(keys: Keys) -> tuple[int, int]:
  """The width and the number of heads; raises UserError if they give no head size where none is given."""
  width, heads = keys.size("hidden_size", None), keys.size("num_attention_heads", None)
  if not keys.value("head_dim", None) and width % heads:
    raise UserError(
      f"{keys.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}"
    )
  return width, heads


def _gpt_neox(keys: Keys) -> dict:
  activation = keys.one_of("hidden_act", ("gelu", *TANH_GELU, "gelu_fast"), "gelu")
  width, heads = _width_and_heads(keys)
  turning, head_dim = rotary.from_config(keys, "gpt_neox"), width // heads
  return dict(
    num_layers=keys.size("num_hidden_layers", None),
    d_model=width,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=head_dim,
    d_mlp=keys.size("intermediate_size", None),
    max_length=keys.size("max_position_embeddings", None),
    position="rope",
    rope_base=turning.base,
    rotary_dim=_rotary_dim(keys, head_dim, turning.share),
    rope_scaling=turning.scaling,
    norm="layernorm",
    norm_eps=_positive(keys, "layer_norm_eps", 1e-5),
    mlp="gelu_exact" if activation == "gelu" else "gelu",
    parallel_residual=keys.flag("use_parallel_residual", True),
    use_bias=True,
    tie_embeddings=keys.flag("tie_word_embeddings", False),
  )


def _rotary_dim(keys: Keys, head_dim: int, share: float) -> int:
  """How many dimensions of a head turn, 0 for all; UserError unless these are pairs."""
  dims = int(head_dim * share)
  if dims < 2 or dims % 2:
    raise UserError(
      f"{keys.where}: rotary_pct={share:g} must leave an even number of the {head_dim} dimensions of a"
      f" head to turn, got {dims}"
    )
  return 0 if dims == head_dim else dims


def _llama(keys: Keys, family: str) -> dict:
  """The fields of Llama and Mistral, which the families that follow change."""
  if family != "gemma3_text":
    keys.one_of("hidden_act", ("silu", "swish"), "silu")
  width, heads = _width_and_heads(keys)
  has_bias = family in ("llama", "smollm3")
  bias = [has_bias and keys.flag(name, False) for name in ("attention_bias", "mlp_bias")]
  if bias[0] != bias[1]:
    raise UserError(
      f"{keys.where}: attention_bias={bias[0]} and mlp_bias={bias[1]} must be equal: biases on every"
      " projection or on none"
    )
  turning = rotary.from_config(keys, family)
  return dict(
    num_layers=keys.size("num_hidden_layers", None),
    d_model=width,
    num_heads=heads,
    # If the key is missing, transformers takes num_attention_heads for Llama, but a fixed number for all others. A
    # fixed number fits few models, so they must have the key.
    num_kv_heads=keys.size("num_key_value_heads", heads if family == "llama" else None),
    head_dim=keys.size("head_dim", width // heads),
    d_mlp=keys.size("intermediate_size", None),
    max_length=_max_length(keys, family),
    position="rope",
    rope_base=turning.base,
    rope_local_base=turning.local_base,
    rope_scaling=turning.scaling,
    norm="rmsnorm",
    norm_eps=_positive(keys, "rms_norm_eps", 1e-6),
    mlp="swiglu",
    use_bias=bias[0],
    tie_embeddings=keys.flag("tie_word_embeddings", family in ("smollm3", "gemma3_text")),
  )


def _qwen2(keys: Keys, found: dict) -> dict:
  return dict(qkv_bias=True) | _windows(keys, found["num_layers"])


def _qwen3(keys: Keys, found: dict) -> dict:
  own = dict(qk_norm=True, head_dim=keys.size("head_dim", 128))
  return own | _windows(keys, found["num_layers"])


def _slides(keys: Keys) -> bool:
  """Whether some layers of a Qwen2 or Qwen3 may have a window: both keys must ask for it, as in transformers."""
  is_off = "sliding_window" in keys.raw and keys.raw["sliding_window"] is None
  return keys.flag("use_sliding_window", False) and not is_off


def _windows(keys: Keys, num_layers: int) -> dict:
  """The window of Qwen2 and Qwen3 and the layers that have it: those that `layer_types` names, or the upper ones."""
  if not _slides(keys):
    return {}
  window, kinds = keys.size("sliding_window", 4096), keys.texts("layer_types")
  first = keys.value("max_window_layers", 28)
  if not isinstance(first, int) or isinstance(first, bool) or first < 0:
    raise keys.wrong("max_window_layers", "must be a whole number of at least 0")
  letters = "".join("G" if index < first else "L" for index in range(num_layers))
  if kinds:
    letters = "".join("G" if kind == "full_attention" else "L" for kind in kinds)
  if "L" not in letters:
    return {}
  return dict(attention_window=window, layer_pattern=shortest_pattern(letters, num_layers))


def _smollm3(keys: Keys, found: dict) -> dict:
  # There the layers without positions would have the window, and no other network has such layers.
  keys.refuse("use_sliding_window", False)
  num_layers = found["num_layers"]
  turns = keys.value("no_rope_layers", None)
  if turns is None:
    every = keys.size("no_rope_layer_interval", 4)
    turns = [int((index + 1) % every != 0) for index in range(num_layers)]
  if not isinstance(turns, list) or len(turns) < num_layers or not {*map(repr, turns)} <= {*"01"}:
    raise keys.wrong(
      "no_rope_layers", f"must hold a 1 (rotary positions) or 0 for each of {num_layers} layers"
    )
  kinds = "".join("NG"[turn] for turn in turns[:num_layers])
  return dict(layer_pattern=shortest_pattern(kinds, num_layers)) if "N" in kinds else {}


def _gemma3(keys: Keys, found: dict) -> dict:
  keys.one_of("hidden_activation", TANH_GELU, TANH_GELU[1])
  head_dim = keys.size("head_dim", 256)
  scalar = keys.size("query_pre_attn_scalar", 256)
  num_layers, kinds = found["num_layers"], keys.texts("layer_types")
  every = keys.size("sliding_window_pattern", 6)
  if not kinds:
    local, whole = "sliding_attention", "full_attention"
    kinds = [local if (index + 1) % every else whole for index in range(num_layers)]
  letters = "".join("G" if kind == "full_attention" else "L" for kind in kinds)
  return dict(
    head_dim=head_dim,
    norm="rmsnorm_1p",
    sandwich_norm=True,
    qk_norm=True,
    mlp="geglu",
    attention_window=keys.size("sliding_window", 4096),
    layer_pattern=shortest_pattern(letters, num_layers),
    query_pre_attn_scalar=0 if scalar == head_dim else scalar,
    scale_embeddings=True,
  )


def _max_length(keys: Keys, family: str) -> int:
  """The longest context; of Mistral, the longest in which every layer attends to all tokens.

  Raises:
    UserError: some layers have a window and others have none, but for Gemma 3, and for Qwen2 and Qwen3 that say so.
  """
  length = keys.size("max_position_embeddings", None)
  kinds = keys.texts("layer_types")
  unlike = set(kinds) - {"full_attention"}
  may_slide = family in ("mistral", "gemma3_text") or (
    family in ("qwen2", "qwen3") and _slides(keys)
  )
  if unlike and not (may_slide and unlike == {"sliding_attention"}):
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
