"""The keys of Hugging Face's config.json for a NetworkConfig: the inverse of hf_fields.py.

Called by hf_config.py. `family_of` finds the one architecture that a network is an instance of, or names the switch
that none has.
"""

from typing import Any, NoReturn

from instructjax.core.errors import UserError
from instructjax.core.network import NetworkConfig
from instructjax.models.interop import rotary
from instructjax.models.positions import layer_kinds

# The switches that only some architectures have, and the values that each can hold. What is not listed may be anything.
_LLAMA: dict[str, tuple] = dict(
  norm=("rmsnorm",),
  mlp=("swiglu",),
  sandwich_norm=(False,),
  qk_norm=(False,),
  parallel_residual=(False,),
  rope_local_base=(0,),
  rotary_dim=(0,),
  query_pre_attn_scalar=(0,),
  scale_embeddings=(False,),
)
_GPT2 = _LLAMA | dict(norm=("layernorm",), mlp=("gelu",), use_bias=(True,))
_GPT_NEOX = _GPT2 | dict(mlp=("gelu", "gelu_exact"))
del _GPT_NEOX["parallel_residual"], _GPT_NEOX["rotary_dim"]
_GEMMA3 = _LLAMA | dict(
  norm=("rmsnorm_1p",),
  mlp=("geglu",),
  sandwich_norm=(True,),
  qk_norm=(True,),
  scale_embeddings=(True,),
  use_bias=(False,),
  qkv_bias=(False,),
)
del _GEMMA3["rope_local_base"], _GEMMA3["query_pre_attn_scalar"]
_SWITCHES = {
  "gpt2": _GPT2,
  "gpt_neox": _GPT_NEOX,
  "llama": _LLAMA,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA | dict(qk_norm=(True,), use_bias=(False,), qkv_bias=(False,)),
  "smollm3": _LLAMA,
  "gemma3_text": _GEMMA3,
}
_KINDS = {"G": "full_attention", "L": "sliding_attention"}  # of layers, in layer_types
_NAMES = {
  "gpt2": "GPT-2",
  "gpt_neox": "GPT-NeoX",
  "llama": "Llama",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "smollm3": "SmolLM3",
  "gemma3_text": "Gemma 3",
}


def _refuse(message: str) -> NoReturn:
  raise UserError(f"no Hugging Face architecture holds this model: {message}")


def family_of(cfg: NetworkConfig) -> str:
  """The architecture that a network is an instance of. Mistral is Llama, once its window is gone.

  Raises:
    UserError: there is none; the message names the switch.
  """
  family, reason = _nearest(cfg)
  kinds = layer_kinds(cfg)
  if family == "gemma3_text":
    if not cfg.attention_window or "N" in kinds or not cfg.rope_local_base:
      _refuse(
        f"{reason} is Gemma 3's, whose attention_window and rope_local_base must be above 0 and whose"
        f" layer_pattern must be of G and L, got attention_window={cfg.attention_window},"
        f" rope_local_base={cfg.rope_local_base:g}, layer_pattern={cfg.layer_pattern!r}"
      )
  elif slides(cfg) and family not in ("qwen2", "qwen3"):
    _refuse(
      f"attention_window={cfg.attention_window} (GPT-3's banded layers) must be 0 or reach over"
      f" max_length={cfg.max_length}"
    )
  for name, values in _SWITCHES[family].items():
    if getattr(cfg, name) not in values:
      _refuse(
        f"{reason} is {_NAMES[family]}'s, whose {name} must be {' or '.join(map(repr, values))}, got"
        f" {getattr(cfg, name)!r}"
      )
  _require_heads(cfg, family)
  return family


def slides(cfg: NetworkConfig) -> bool:
  """Whether some layer has a window shorter than the context."""
  return "L" in layer_kinds(cfg) and 0 < cfg.attention_window < cfg.max_length


def _nearest(cfg: NetworkConfig) -> tuple[str, str]:
  """The architecture by a switch that only one has, and that switch."""
  if cfg.position == "learned":
    return "gpt2", "position='learned'"
  if cfg.norm == "layernorm":
    return "gpt_neox", "position='rope' with norm='layernorm'"
  if cfg.norm == "rmsnorm_1p":
    return "gemma3_text", "norm='rmsnorm_1p'"
  if "N" in layer_kinds(cfg):
    return "smollm3", f"layer_pattern={cfg.layer_pattern!r}"
  if cfg.qk_norm:
    return "qwen3", "qk_norm=True"
  if cfg.qkv_bias and not cfg.use_bias:
    return "qwen2", "qkv_bias=True"
  return "llama", "norm='rmsnorm'"


def _require_heads(cfg: NetworkConfig, family: str):
  """Raises UserError for heads that the architecture has no place for."""
  shape = f"num_heads={cfg.num_heads}, num_kv_heads={cfg.num_kv_heads}, head_dim={cfg.head_dim}"
  if family in ("gpt2", "gpt_neox"):
    fills = cfg.num_heads * cfg.head_dim == cfg.d_model
    if cfg.num_kv_heads != cfg.num_heads or not fills:
      _refuse(
        f"{shape} must be equal numbers of heads that fill d_model={cfg.d_model} ({_NAMES[family]})"
      )
  elif family != "qwen3" and cfg.d_model % cfg.num_heads:
    _refuse(
      f"d_model={cfg.d_model} must be a multiple of num_heads={cfg.num_heads} ({_NAMES[family]})"
    )


def keys_of(cfg: NetworkConfig, family: str) -> dict[str, Any]:
  """The keys that `hf_fields.fields` reads for this family."""
  if family == "gpt2":
    return {
      "n_layer": cfg.num_layers,
      "n_embd": cfg.d_model,
      "n_head": cfg.num_heads,
      "n_inner": cfg.d_mlp,
      "n_positions": cfg.max_length,
      "layer_norm_epsilon": cfg.norm_eps,
      "activation_function": "gelu_new",
    }
  result = {
    "num_hidden_layers": cfg.num_layers,
    "hidden_size": cfg.d_model,
    "num_attention_heads": cfg.num_heads,
    "intermediate_size": cfg.d_mlp,
    "max_position_embeddings": cfg.max_length,
    **rotary.to_config(_rotary(cfg), family),
  }
  if family == "gpt_neox":
    return result | {
      "layer_norm_eps": cfg.norm_eps,
      "hidden_act": "gelu" if cfg.mlp == "gelu_exact" else "gelu_new",
      "use_parallel_residual": cfg.parallel_residual,
      "attention_bias": True,
    }
  result |= {
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    "rms_norm_eps": cfg.norm_eps,
  }
  if family in ("smollm3", "gemma3_text"):
    # Their classes have ids of their own tokenizers for defaults, which a smaller vocabulary may not even have.
    result |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  if family == "gemma3_text":
    return result | _gemma3(cfg)
  result["hidden_act"] = "silu"
  if family == "smollm3":
    result["no_rope_layers"] = [int(kind != "N") for kind in _every_layer(cfg)]
  # The configs of Qwen2 and Qwen3 have no keys for biases: the architecture has them on queries, keys and values.
  if family in ("llama", "smollm3"):
    result |= {"attention_bias": cfg.use_bias, "mlp_bias": cfg.use_bias}
  if family in ("qwen2", "qwen3"):
    return result | _windows(cfg)
  if family == "smollm3":
    result["use_sliding_window"] = False
  return result


def _windows(cfg: NetworkConfig) -> dict[str, Any]:
  """The keys of Qwen2's and Qwen3's windows."""
  if "L" not in layer_kinds(cfg):
    return {"use_sliding_window": False}
  letters = _every_layer(cfg)
  result = {
    "use_sliding_window": True,
    "sliding_window": cfg.attention_window,
    "layer_types": [_KINDS[letter] for letter in letters],
  }
  # What transformers before 4.53 reads instead of layer_types: from which layer on there is a window.
  first = letters.index("L")
  return result if "G" in letters[first:] else result | {"max_window_layers": first}


def _rotary(cfg: NetworkConfig) -> rotary.Rotary:
  share = rotary.share_of(cfg.rotary_dim or cfg.head_dim, cfg.head_dim)
  return rotary.Rotary(cfg.rope_base, cfg.rope_scaling, share, cfg.rope_local_base)


def _every_layer(cfg: NetworkConfig) -> str:
  """The kind of each layer, a letter each, as `layer_pattern` has it."""
  return (cfg.layer_pattern * cfg.num_layers)[: cfg.num_layers]


def _gemma3(cfg: NetworkConfig) -> dict[str, Any]:
  result = {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": cfg.query_pre_attn_scalar or cfg.head_dim,
    "sliding_window": cfg.attention_window,
    "layer_types": [_KINDS[kind] for kind in _every_layer(cfg)],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
  }
  # What transformers before 4.53 reads instead of layer_types.
  every = len(cfg.layer_pattern)
  if cfg.layer_pattern == "L" * (every - 1) + "G":
    result["sliding_window_pattern"] = every
  return result
