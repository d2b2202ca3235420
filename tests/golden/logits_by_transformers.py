"""Records the logits of small models by transformers in huggingface_logits.json; torch and transformers are needed.

  python -m tests.golden.logits_by_transformers

The weights are those of `golden_weight` in tests/models/interop/conftest.py, made from their names.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

from tests.models.interop.conftest import golden_weight

LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=1e4,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8,
)
SIZES = dict(
  vocab_size=17,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
)
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GEMMA3 = SIZES | dict(
  head_dim=8,
  query_pre_attn_scalar=12,
  sliding_window=3,
  layer_types=["sliding_attention", "full_attention"],
)
WINDOW = dict(use_sliding_window=True, sliding_window=3)
PARTIAL = dict(rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5)
CASES = {
  "gpt2": ("gpt2", dict(vocab_size=17, n_embd=16, n_layer=2, n_head=4, n_positions=12)),
  "llama_tied": ("llama", SIZES | dict(tie_word_embeddings=True)),
  "llama3_untied": ("llama", SIZES | dict(head_dim=8, rope_parameters=LLAMA3)),
  "qwen2": ("qwen2", SIZES | dict(num_key_value_heads=1)),
  "qwen2_window": ("qwen2", SIZES | WINDOW | dict(num_hidden_layers=3, max_window_layers=1)),
  "qwen3": ("qwen3", SIZES | dict(head_dim=6, tie_word_embeddings=True)),
  "qwen3_window": (
    "qwen3",
    SIZES | WINDOW | dict(layer_types=["sliding_attention", "full_attention"], head_dim=6),
  ),
  "gpt_neox": ("gpt_neox", NEOX | dict(rope_parameters=PARTIAL)),
  "smollm3": ("smollm3", SIZES | dict(no_rope_layers=[1, 0], pad_token_id=None)),
  "gemma3": ("gemma3_text", GEMMA3),
}
TOKEN_BL = np.arange(20).reshape(2, 10) * 7 % 17
RIGHT_BL = np.arange(10)[None] < np.array([[10], [6]])


def recorded(family: str, sizes: dict) -> dict:
  """Config, shapes, and the logits at the tokens of a right-padded and a left-padded batch."""
  config = transformers.AutoConfig.for_model(family, **sizes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  state = model.state_dict()
  if model.config.tie_word_embeddings:
    del state["lm_head.weight"]
  # In files, GPT-NeoX's head has another name than inside the class of transformers 5.
  in_file = {name: name for name in state}
  if family == "gpt_neox":
    in_file["lm_head.weight"] = "embed_out.weight"
  draw = lambda name, x: torch.tensor(golden_weight(in_file[name], tuple(x.shape)))
  model.load_state_dict({name: draw(name, x) for name, x in state.items()}, strict=False)
  shapes = {in_file[name]: list(x.shape) for name, x in state.items()}
  case = dict(config=model.config.to_dict(), shapes=shapes)
  for side, mask_BL in (("right", RIGHT_BL), ("left", RIGHT_BL[:, ::-1])):
    position_BL = np.maximum(np.cumsum(mask_BL, 1) - 1, 0)
    with torch.no_grad():
      logits_BLV = model(
        input_ids=torch.tensor(TOKEN_BL),
        position_ids=torch.tensor(position_BL),
        attention_mask=torch.tensor(mask_BL.astype(int)),
      ).logits.numpy()
    case[side] = np.round(logits_BLV[mask_BL].astype(float), 5).tolist()
  return case


def main():
  cases = {name: recorded(*case) for name, case in CASES.items()}
  note = dict(
    source=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU,"
    " by tests/golden/logits_by_transformers.py",
    when_to_update="Never for a change of our code. When the script records other cases.",
  )
  lines = [f'"{name}": {json.dumps(value)}' for name, value in (note | {"cases": cases}).items()]
  path = pathlib.Path(__file__).with_name("huggingface_logits.json")
  path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
