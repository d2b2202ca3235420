"""Which keys of config.json change a model's logits, and which do not. Called by hf_config.py.

A key that no reader knows is how a file is read wrong without a word: the weights fit, and the model computes something
else. So the keys are sorted: those that hf_fields.py and rotary.py read; those that change no logits; those that would,
and must have the value that changes nothing; and the rest, which transformers' class for the architecture ignores as
well. The rest is named in one line of the log.
"""

from absl import logging

from instructjax.core.foreign import Keys, named
from instructjax.models.interop import rotary

_LLAMA = (
  *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
  *("num_hidden_layers", "max_position_embeddings", "hidden_act", "rms_norm_eps", "layer_types"),
)
_READ = {
  "gpt2": (
    *("activation_function", "n_embd", "n_head", "n_layer", "n_positions", "n_inner"),
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"),
    "layer_norm_epsilon",
  ),
  "llama": (*_LLAMA, "attention_bias", "mlp_bias"),
  "mistral": (*_LLAMA, "sliding_window"),
  # Without use_sliding_window, the other two are not read by transformers either.
  "qwen2": (*_LLAMA, "use_sliding_window", "sliding_window", "max_window_layers"),
  "qwen3": (*_LLAMA, "use_sliding_window", "sliding_window", "max_window_layers"),
  "smollm3": (
    *(*_LLAMA, "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window"),
    *("no_rope_layers", "no_rope_layer_interval", "max_window_layers"),
  ),
  "gpt_neox": (
    *("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "use_parallel_residual"),
  ),
  "gemma3_text": (
    *(*_LLAMA, "hidden_activation", "query_pre_attn_scalar", "sliding_window"),
    "sliding_window_pattern",
  ),
}
_READ_BY_ALL = (
  *("model_type", "architectures", "vocab_size", "tie_word_embeddings", "initializer_range"),
  *("id2label", "num_labels", "instructjax_score_bias", "instructjax_pad_row"),
)

# Keys that change no logits: names and notes, ids of tokens, training, how results are returned, and sampling, which
# transformers 4 kept in config.json.
_HARMLESS = {
  *("_name_or_path", "name_or_path", "transformers_version", "transformers.js_config", "dtype"),
  *("torch_dtype", "torchscript", "use_bfloat16", "use_cache", "cache_implementation", "use_mems"),
  *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id"),
  *("mask_token_id", "decoder_start_token_id", "tokenizer_class", "prefix", "chat_template"),
  *("label2id", "problem_type", "task_specific_params", "finetuning_task", "is_decoder"),
  *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
  *("classifier_dropout", "classifier_dropout_prob", "layerdrop", "dropout"),
  *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
  *("summary_first_dropout", "gradient_checkpointing", "pretraining_tp", "n_ctx"),
  *("reorder_and_upcast_attn", "chunk_size_feed_forward", "output_hidden_states", "return_dict"),
  *("output_attentions", "output_scores", "return_dict_in_generate", "remove_invalid_values"),
  *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
  *("_flash_attn_2_enabled", "max_length", "min_length", "max_new_tokens", "do_sample"),
  *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k"),
  *("top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
  *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "suppress_tokens"),
  *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "tie_encoder_decoder"),
  *("exponential_decay_length_penalty", "tf_legacy_loss", "unsloth_version", "unsloth_fixed"),
  "original_max_position_embeddings",  # read by rotary.py where it matters
  "_sliding_window_pattern",  # what layer_types were made of
}

# Keys that change the logits in some architecture or some version -> the values with which they change nothing.
_MUST_BE = {
  "quantization_config": (),
  "compression_config": (),
  "transformers_weights": ("model.safetensors",),  # another file in place of model.safetensors
  "per_layer_config": ({}, []),
  "pruned_heads": ({},),
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "scale_attn_weights": (True,),
  "scale_attn_by_inverse_layer_idx": (False,),
  "use_parallel_residual": (False,),
  "parallel_attn": (False,),
  "alibi": (False,),
  "use_alibi": (False,),
  "qk_layernorm": (False,),
  "qk_norm": (False,),
  "use_qk_norm": (False,),
  "clip_qkv": (),
  "use_logn_attn": (False,),
  "attn_logit_softcapping": (0,),
  "final_logit_softcapping": (0,),
  "logit_scale": (1,),
  "logits_scaling": (1,),
  "embedding_multiplier": (1,),
  "residual_multiplier": (1,),
  "attention_multiplier": (),
  "query_pre_attn_scalar": (),
  "scale_embedding": (False,),
  "embedding_size": (),
  "num_local_experts": (0, 1),
  "num_experts": (0, 1),
  "n_routed_experts": (0,),
}
# The same for one architecture only: others do not read the key, or read it in hf_fields.py.
_MUST_BE_IN = {
  "gpt_neox": {"attention_bias": (True,)},
  "qwen3": {"attention_bias": (False,)},
  "gemma3_text": {"attention_bias": (False,), "use_bidirectional_attention": (False,)},
}


def check(keys: Keys, family: str):
  """Refuses keys that would change the logits, and names those that nothing reads.

  Raises:
    UserError: a key of `_MUST_BE` has another value.
  """
  must_be = _MUST_BE | _MUST_BE_IN.get(family, {})
  for name, values in must_be.items():
    if name not in _READ[family]:
      keys.refuse(name, *values)
  known = {*_READ[family], *_READ_BY_ALL, *_HARMLESS, *must_be}
  unread = [
    name
    for name in keys.raw
    if name not in known and keys.has(name) and not rotary.is_rotary(name)  # rotary.py judges those
  ]
  if unread:
    more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
    logging.warning(
      "%s: not read, since architecture %s has no use for it in transformers either: %s%s",
      *(keys.where, family, ", ".join(map(named, sorted(unread)[:8])), more),
    )
