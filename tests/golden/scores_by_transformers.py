"""Records what transformers' sequence classifiers score, in scores.json beside this file.

  python tests/golden/scores_by_transformers.py

Needs torch and transformers 5, which the test that reads the numbers does not. A case is a classifier with one label:
its config.json, its tensors' shapes (their numbers follow from their names), and the scores of a padded batch. The last
sequence of each batch ends in the EOS, token 0. The pad token is the EOS, another token, or none.
"""

import json
import pathlib
import zlib

import numpy as np
import torch
import transformers

SIZES = dict(
  vocab_size=17,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=32,
)
GPT2 = dict(vocab_size=17, n_embd=16, n_layer=2, n_head=4, n_positions=12)
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | dict(
  num_attention_heads=2
)
CASES = {
  "gpt2, the pad is the EOS": ("gpt2", GPT2 | dict(pad_token_id=0)),
  "llama, the pad is the EOS": ("llama", SIZES | dict(pad_token_id=0)),
  "llama, another pad": ("llama", SIZES | dict(pad_token_id=16)),
  "llama, no pad": ("llama", SIZES),
  "mistral, another pad": ("mistral", SIZES | dict(pad_token_id=16, sliding_window=None)),
  "gpt_neox, the pad is the EOS": ("gpt_neox", NEOX | dict(pad_token_id=0)),
  "qwen3, the pad is the EOS": ("qwen3", SIZES | dict(pad_token_id=0, head_dim=8)),
  "qwen2, the pad is the EOS": ("qwen2", SIZES | dict(pad_token_id=0)),
}
SEQUENCES = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9, 0]]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_norm = name.endswith(".weight") and len(shape) == 1
  return rng.normal(float(is_norm), 0.3, shape).astype(np.float32)


def record(kind: str, sizes: dict) -> dict:
  config = transformers.AutoConfig.for_model(
    kind, num_labels=1, bos_token_id=0, eos_token_id=0, **sizes
  )
  model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
  state = model.state_dict()
  model.load_state_dict({k: torch.tensor(weight(k, tuple(v.shape))) for k, v in state.items()})
  pad = config.pad_token_id
  # Without a pad token transformers takes one sequence at a time.
  batches = [[one] for one in SEQUENCES] if pad is None else [SEQUENCES]
  scores = []
  for batch in batches:
    length = max(map(len, batch))
    token = torch.tensor([one + [pad or 0] * (length - len(one)) for one in batch])
    mask = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in batch])
    with torch.no_grad():
      scores += model(input_ids=token, attention_mask=mask).logits[:, 0].tolist()
  written = config.to_dict() | {"architectures": [type(model).__name__]}
  shapes = {name: list(tensor.shape) for name, tensor in state.items()}
  return {"config": written, "shapes": shapes, "scores": [round(score, 6) for score in scores]}


def main():
  note = {
    "source": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32 on a CPU, by"
    " scores_by_transformers.py beside this file",
    "when_to_update": "Never for a change of our code. When the script records other cases.",
    "sequences": SEQUENCES,
    "cases": {name: record(*case) for name, case in CASES.items()},
  }
  lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in note.items()]
  path = pathlib.Path(__file__).with_name("scores.json")
  path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
