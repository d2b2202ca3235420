"""Records what `peft` computes with LoRA adapters on small random models, in adapters.json beside this file.

  python tests/golden/adapters_by_peft.py

Needs torch, transformers 5 and peft, which the tests that read the numbers do not. Weights are not recorded: both sides
make them by `tensor` from a tensor's name and shape. Recorded are, for each model, its config.json, the mean
negative log-likelihood of a batch, and of the gradient of every factor A and B the norm and the first numbers.
"""

import json
import math
import pathlib
import zlib

import numpy as np
import peft
import torch
import transformers

RANK, ALPHA, LENGTH, ROWS = 3, 6.0, 12, 2
MODELS = {
  "gpt2": dict(
    config=transformers.GPT2Config(
      vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=32,
      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    targets=["c_attn", "c_proj", "c_fc"],
  ),
  "llama": dict(
    config=transformers.LlamaConfig(
      vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
      tie_word_embeddings=False,
    ),
    targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
  ),
  "llama, q and v only": dict(
    config=transformers.LlamaConfig(
      vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
      tie_word_embeddings=True,
    ),
    targets=["q_proj", "v_proj"],
  ),
}  # fmt: skip


def tensor(name: str, shape) -> np.ndarray:
  """The numbers of a tensor, float32: a sine wave whose phase is a hash of its name; norms are near 1."""
  phase = zlib.crc32(name.encode()) % 1000
  wave = np.sin(phase + 1.7 * np.arange(math.prod(shape)), dtype=np.float64).reshape(shape)
  is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
  return (1 + 0.1 * wave if is_norm else 0.2 * wave).astype(np.float32)


def batch() -> np.ndarray:
  return (np.arange(ROWS * LENGTH) * 7 % 39).reshape(ROWS, LENGTH)


def summary(array: np.ndarray) -> dict:
  return {"norm": float(np.linalg.norm(array)), "first": array.reshape(-1)[:6].tolist()}


def record(config, targets) -> dict:
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
  model = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM",
      fan_in_fan_out=config.model_type == "gpt2",
    ),
  )  # fmt: skip
  plain = lambda name: (
    name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")
  )
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if plain(name) != "lm_head.weight" or not config.tie_word_embeddings:
        parameter.copy_(torch.from_numpy(tensor(plain(name), parameter.shape)))
  ids = torch.from_numpy(batch())
  loss = model(input_ids=ids, labels=ids).loss
  loss.backward()
  return {
    "config": json.loads(model.get_base_model().config.to_json_string()),
    "targets": targets,
    "loss": loss.item(),
    "gradients": {
      plain(name): summary(parameter.grad.numpy())
      for name, parameter in model.named_parameters()
      if parameter.requires_grad
    },
  }


def main():
  models = {name: record(**case) for name, case in MODELS.items()}
  found = {
    "source": "tests/golden/adapters_by_peft.py",
    "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft)},
    "when_to_update": "never, unless a case is added: these are peft's numbers, not ours",
    "rank": RANK,
    "alpha": ALPHA,
    "models": models,
  }
  path = pathlib.Path(__file__).with_name("adapters.json")
  path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
