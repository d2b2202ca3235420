"""Translates Hugging Face's config.json to NetworkConfig and back, for the architectures that both can describe.

Called by the package's own `describe`, by huggingface.py and by gguf_export.py; gguf_file.py brings a GGUF file's
metadata into this form. hf_fields.py and hf_keys.py have the keys of each architecture, and rotary.py those of rotary
positions. Knows no tensors.

Every key of a file is obeyed, or refused, or known to change no logits, or named in one line of the log.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from instructjax.core.config import NetworkConfig
from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys, shown
from instructjax.core.stages import Head
from instructjax.models.interop import config_keys, hf_fields, hf_keys

# Architectures near to those above -> what NetworkConfig has no switch for.
_AWAY = {
  "gemma": "norms without sandwich norms in its tensors' names (Gemma 1)",
  "gemma2": "soft caps (attn_logit_softcapping, final_logit_softcapping)",
  "gemma3": "images; take its language model, saved with model_type 'gemma3_text'",
  "gemma3n": "embeddings of each layer and AltUp (hidden_size_per_layer_input)",
  "gemma4": "embeddings of each layer (hidden_size_per_layer_input)",
  "gemma4_text": "embeddings of each layer (hidden_size_per_layer_input)",
  "qwen2_moe": "experts (num_experts)",
  "qwen3_moe": "experts (num_experts)",
  "mixtral": "experts (num_local_experts)",
  "gpt_oss": "experts (num_local_experts) and attention sinks",
  "llama4": "experts (num_local_experts)",
  "llama4_text": "experts (num_local_experts)",
  "olmo": "LayerNorm without weights, and clip_qkv",
  "olmo2": "norms after the branches only, and norms of all heads' queries and keys together",
  "olmo3": "norms after the branches only, and norms of all heads' queries and keys together",
  "phi": "one norm for both parallel branches, and a head with a bias",
  "phi3": "fused projections (qkv_proj, gate_up_proj)",
  "stablelm": "swiglu with layernorm (use_qkv_bias, qk_layernorm)",
  "cohere": "one norm for both parallel branches, and logit_scale",
  "cohere2": "one norm for both parallel branches, and logit_scale",
  "granite": "multipliers (embedding_multiplier, residual_multiplier, logits_scaling)",
  "starcoder2": "layernorm with grouped heads and a gelu MLP (use_bias)",
  "falcon": "one norm for both parallel branches (new_decoder_architecture)",
  "gptj": "rotary pairs of neighbouring dimensions, and one norm for both branches",
  "gpt_neo": "local layers without scaled scores (attention_types)",
  "gpt_bigcode": "one key/value head with learned positions (multi_query)",
  "opt": "learned positions from 2 on, and relu (activation_function)",
  "bloom": "ALiBi",
  "mpt": "ALiBi (attn_config)",
  "glm4": "rotary pairs of neighbouring dimensions (partial_rotary_factor)",
  "nemotron": "relu2 (hidden_act), and layernorm with weights of 1 + w",
  "deepseek_v3": "latent attention (kv_lora_rank) and experts",
}

# Keys of our own in an exported config.json.
SCORE_BIAS = "instructjax_score_bias"  # Hugging Face's score heads have no bias
PAD_ROW = "instructjax_pad_row"  # the export has added a last row to the embedding, for a pad token

_BARE = {
  "gpt2": "GPT2Model",
  "gpt_neox": "GPTNeoXModel",
  "llama": "LlamaModel",
  "mistral": "MistralModel",
  "qwen2": "Qwen2Model",
  "qwen3": "Qwen3Model",
  "smollm3": "SmolLM3Model",
  "gemma3_text": "Gemma3TextModel",
}
_LM = {family: f"{name.removesuffix('Model')}ForCausalLM" for family, name in _BARE.items()}
_LM |= {"gpt2": "GPT2LMHeadModel", "gemma3_text": "Gemma3ForCausalLM"}
# Of a classifier; not always the language model's name with another end: Gemma 3's has "Text" in it.
CLASSIFIERS = {
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
  if keys.value("model_type") in tuple(_AWAY):
    raise keys.wrong(
      "model_type",
      f"is not supported: it needs {_AWAY[raw['model_type']]}; known: {', '.join(_LM)}",
    )
  family = keys.one_of("model_type", tuple(_LM))
  config_keys.check(keys, family)
  init_std = keys.number("initializer_range", 0.02)
  cfg = NetworkConfig(**hf_fields.fields(keys, family), init_std=init_std)
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
  if classes[0] != CLASSIFIERS[family]:
    raise UserError(
      f"{keys.where}: architectures={shown(classes)} must be {_LM[family]} or {CLASSIFIERS[family]}"
    )
  labels = keys.block("id2label")
  # transformers does not write its default, which is two labels. So a missing count is two, and is refused.
  count = len(labels.raw) if labels is not None else keys.size("num_labels", 2)
  if count != 1:
    raise UserError(f"{keys.where}: num_labels={count} must be 1: one score a sequence")
  return "scalar"


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
  family = hf_keys.family_of(cfg)
  result = {
    "model_type": family,
    "architectures": [(_LM if head == "lm" else CLASSIFIERS)[family]],
    "vocab_size": vocab_size + (head == "scalar"),
    "tie_word_embeddings": cfg.tie_embeddings,
    "initializer_range": cfg.init_std,
    "torch_dtype": "float32",
    **hf_keys.keys_of(cfg, family),
  }
  if head == "scalar":
    # transformers reads the score at the last token that is not a pad, so it needs a pad id. Our pad id, vocab_size, is
    # no token of the tokenizer, so no real token is taken for a pad (details item 2).
    result |= {"pad_token_id": vocab_size, PAD_ROW: True, SCORE_BIAS: score_bias}
    result |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
  return result
