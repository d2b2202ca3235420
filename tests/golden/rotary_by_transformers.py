"""Records what transformers computes from each spelling of rotary settings, in rotary.json beside this file.

  python tests/golden/rotary_by_transformers.py

Needs torch and transformers 5, which the tests that read the numbers do not. A case is a set of keys for config.json of
a small model. Recorded are the inverse frequencies and the factor on cosine and sine of the model's own rotary
embedding, made from the file as `from_pretrained` makes it, or the name of the exception.
"""

import json
import logging
import pathlib
import tempfile

import torch
import transformers

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
DEFAULT5 = {"rope_type": "default", "rope_theta": 10000.0}
TOP = "original_max_position_embeddings"


def less(block, *names):
  return {name: value for name, value in block.items() if name not in names}


def old(block):
  return less(block, "rope_type") | {"type": block["rope_type"]}


CASES = {
  # The base alone.
  "nothing": {},
  "theta at the top": {"rope_theta": 500.0},
  "theta at the top, a whole number": {"rope_theta": 500},
  "theta in rope_parameters": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
  "theta in rope_parameters without a type": {"rope_parameters": {"rope_theta": 500.0}},
  "theta in rope_scaling": {"rope_scaling": {"rope_theta": 500.0, "rope_type": "default"}},
  "theta in both places, equal": {
    "rope_theta": 500.0,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
  },
  "theta in both places, different": {
    "rope_theta": 700.0,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
  },
  "theta null": {"rope_theta": None},
  "theta null at the top, given inside": {
    "rope_theta": None,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
  },
  "theta null inside": {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
  "theta at the top beside scaling": {"rope_theta": 500.0, "rope_scaling": LINEAR},
  "theta beside rope_parameters without it": {"rope_theta": 500.0, "rope_parameters": LINEAR},
  "theta only in the block that is replaced": {
    "rope_scaling": LINEAR,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
  },
  # No scaling.
  "scaling null": {"rope_scaling": None, "rope_theta": 500.0},
  "scaling empty": {"rope_scaling": {}, "rope_theta": 500.0},
  "both blocks null": {"rope_scaling": None, "rope_parameters": None},
  "type default": {"rope_scaling": {"rope_type": "default"}},
  "old type default": {"rope_scaling": {"type": "default"}},
  "type none": {"rope_scaling": {"rope_type": "none"}},
  "type null": {"rope_scaling": {"rope_type": None, "factor": 4.0}},
  "type unknown": {"rope_scaling": {"rope_type": "su", "factor": 4.0}},
  "factor without a type": {"rope_scaling": {"factor": 4.0}},
  "factor without a type, version 5": {"rope_parameters": {"factor": 4.0, "rope_theta": 500.0}},
  "factor beside default": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
  # Linear.
  "linear": {"rope_scaling": LINEAR},
  "linear, old type": {"rope_scaling": old(LINEAR)},
  "linear, both types": {"rope_scaling": LINEAR | {"type": "linear"}},
  "linear, types that differ": {"rope_scaling": LINEAR | {"type": "llama3"}},
  "default, old type linear": {
    "rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4.0}
  },
  "linear, version 5": {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
  "linear, version 5, old type": {"rope_parameters": old(LINEAR) | {"rope_theta": 500.0}},
  "linear without a factor": {"rope_scaling": {"rope_type": "linear"}},
  "linear, factor null": {"rope_scaling": {"rope_type": "linear", "factor": None}},
  "linear, factor outside": {"rope_scaling": {"rope_type": "linear"}, "factor": 4.0},
  "linear, whole factor": {"rope_scaling": {"rope_type": "linear", "factor": 4}},
  "linear, factor 1": {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
  "linear, factor below 1": {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
  "linear, attention_factor": {"rope_scaling": LINEAR | {"attention_factor": 2.0}},
  "linear, mscale": {"rope_scaling": LINEAR | {"mscale": 0.7}},
  "linear, original length inside": {"rope_scaling": LINEAR | {TOP: 32}},
  "linear, original length at the top": {"rope_scaling": LINEAR, TOP: 32},
  # Both blocks.
  "both equal": {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10000.0}},
  "both, other factors": {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
  "scaling beside default parameters": {"rope_scaling": LINEAR, "rope_parameters": DEFAULT5},
  "default scaling beside parameters": {
    "rope_scaling": {"rope_type": "default"},
    "rope_parameters": LINEAR | {"rope_theta": 10000.0},
  },
  "scaling null beside parameters": {"rope_scaling": None, "rope_parameters": LINEAR},
  "scaling empty beside parameters": {"rope_scaling": {}, "rope_parameters": LINEAR},
  "llama3 beside default parameters": {"rope_scaling": LLAMA3, "rope_parameters": DEFAULT5},
  "llama3 and linear": {"rope_scaling": LLAMA3, "rope_parameters": LINEAR},
  # Llama 3.
  "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
  "llama3, old type": {"rope_scaling": old(LLAMA3), "rope_theta": 500.0},
  "llama3, version 5": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
  "llama3, whole numbers": {
    "rope_scaling": LLAMA3 | {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
  },
  "llama3, original length missing": {"rope_scaling": less(LLAMA3, TOP)},
  "llama3, original length at the top": {"rope_scaling": less(LLAMA3, TOP), TOP: 32},
  "llama3, original lengths agree": {"rope_scaling": LLAMA3, TOP: 32},
  "llama3, original lengths differ": {"rope_scaling": LLAMA3, TOP: 16},
  "llama3, original length null": {"rope_scaling": LLAMA3 | {TOP: None}},
  "llama3 without low_freq_factor": {"rope_scaling": less(LLAMA3, "low_freq_factor")},
  "llama3 without high_freq_factor": {"rope_scaling": less(LLAMA3, "high_freq_factor")},
  "llama3 without a factor": {"rope_scaling": less(LLAMA3, "factor")},
  "llama3, low at the top": {
    "rope_scaling": less(LLAMA3, "low_freq_factor"),
    "low_freq_factor": 1.0,
  },
  "llama3, low above high": {"rope_scaling": LLAMA3 | {"low_freq_factor": 8.0}},
  # Others.
  "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
  "dynamic, old type": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
  "dynamic without a factor": {"rope_scaling": {"type": "dynamic"}},
  "dynamic, original length": {"rope_scaling": {"type": "dynamic", "factor": 4.0, TOP: 32}},
  "yarn": {"rope_scaling": YARN},
  "yarn, old type": {"rope_scaling": old(YARN)},
  "yarn, factor 1": {"rope_scaling": YARN | {"factor": 1.0}},
  "yarn, attention_factor": {"rope_scaling": YARN | {"attention_factor": 2.0}},
  "yarn, attention_factor 0": {"rope_scaling": YARN | {"attention_factor": 0.0}},
  "yarn, version 5": {"rope_parameters": YARN | {"rope_theta": 500.0}},
  "yarn, longer": {"rope_scaling": YARN | {TOP: 4096, "factor": 40.0}, "rope_theta": 500.0},
  "yarn, betas": {"rope_scaling": YARN | {TOP: 64, "beta_fast": 8, "beta_slow": 0.5}},
  "yarn, betas 0": {"rope_scaling": YARN | {TOP: 64, "beta_fast": 0, "beta_slow": None}},
  "yarn, betas reversed": {"rope_scaling": YARN | {TOP: 64, "beta_fast": 1, "beta_slow": 8}},
  "yarn, one pair between": {"rope_scaling": YARN | {TOP: 7, "beta_fast": 1.0, "beta_slow": 0.99}},
  "yarn, shorter than a turn": {"rope_scaling": YARN | {TOP: 4}},
  "yarn, both mscales": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}},
  "yarn, equal mscales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
  "yarn, mscale alone": {"rope_scaling": YARN | {"mscale": 0.5}},
  "yarn, mscales beside attention_factor": {
    "rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 2.0, "attention_factor": 1.5}
  },
  "yarn, factor 1, mscales": {
    "rope_scaling": YARN | {"factor": 1.0, "mscale": 0.5, "mscale_all_dim": 2.0}
  },
  "yarn, truncate": {"rope_scaling": YARN | {"truncate": True}},
  "yarn, not truncated": {"rope_scaling": YARN | {TOP: 64, "truncate": False}},
  "yarn without a factor": {"rope_scaling": less(YARN, "factor")},
  "yarn, original length missing": {"rope_scaling": less(YARN, TOP)},
  "yarn, original length at the top": {"rope_scaling": less(YARN, TOP), TOP: 32},
  "yarn, original lengths differ": {"rope_scaling": YARN, TOP: 16},
  "longrope": {"rope_scaling": LONG, TOP: 32},
  "proportional": {"rope_parameters": DEFAULT5 | {"rope_type": "proportional"}},
  # Rotated in part.
  "partial at the top": {"partial_rotary_factor": 0.5},
  "partial at the top beside linear": {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
  "partial inside": {"rope_parameters": DEFAULT5 | {"partial_rotary_factor": 0.5}},
  "partial 1": {"partial_rotary_factor": 1.0},
  # One setting a kind of layer.
  "by kind of layer": {
    "rope_parameters": {
      "full_attention": DEFAULT5 | {"rope_theta": 500.0},
      "sliding_attention": DEFAULT5,
    }
  },
  "by kind of layer, one": {"rope_parameters": {"full_attention": LINEAR | {"rope_theta": 500.0}}},
  # Keys of other architectures.
  "rotary_pct": {"rotary_pct": 0.25},
  "rotary_dim": {"rotary_dim": 4},
  "rotary_emb_base": {"rotary_emb_base": 500},
  "rope_local_base_freq": {"rope_local_base_freq": 500.0},
  "rope_type at the top": {"rope_type": "linear", "rope_theta": 500.0},
  "rope_scaling_factor": {"rope_scaling_factor": 4.0},
  "no_rope_layers": {"no_rope_layers": [1, 0]},
}
SIZES = dict(
  vocab_size=17,
  hidden_size=64,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
)
CLASSES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
}
# All spellings for Llama; for the others those that show which of the places counts.
FEW = (
  "theta at the top",
  "linear, old type",
  "linear, version 5",
  "llama3",
  "dynamic",
  "yarn",
  "both equal",
)


def computed(raw: dict) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(raw))
    try:
      config = transformers.AutoConfig.from_pretrained(folder)
      model = getattr(transformers, raw["architectures"][0])(config)
      # At max_position_embeddings, the longest context: `dynamic` recomputes from there on.
      position_BL = torch.arange(config.max_position_embeddings)[None]
      model.model.rotary_emb(torch.zeros(1), position_BL)
    except Exception as error:
      return {"error": type(error).__name__}
    turning = model.model.rotary_emb
    return {"inv_freq": turning.inv_freq.tolist(), "factor": float(turning.attention_scaling)}


def main():
  logging.disable(logging.WARNING)
  cases = {}
  for family, name in CLASSES.items():
    for case, keys in CASES.items():
      if family != "llama" and case not in FEW:
        continue
      raw = {"model_type": family, "architectures": [name]} | SIZES | keys
      raw |= {"sliding_window": None} if family == "mistral" else {}
      cases[f"{family}: {case}"] = {"config": raw} | computed(raw)
  note = dict(
    source=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU,"
    " by tests/golden/rotary_by_transformers.py",
    when_to_update="Never for a change of our code. When the script records other cases.",
  )
  lines = [f'"{name}": {json.dumps(value)}' for name, value in note.items()]
  inner = [f'"{name}": {json.dumps(value)}' for name, value in cases.items()]
  lines.append('"cases": {\n' + ",\n".join(inner) + "\n}")
  path = pathlib.Path(__file__).with_name("rotary.json")
  path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
