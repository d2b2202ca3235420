"""Decode steps of transformers' `generate` as a worker of benchmarks.turns; in .venv-trl, never instructjax.

  .venv-trl/bin/python decode_transformers.py '{"model": {...}, ...}'     what benchmarks.decode gives its peer

float32, two threads; random weights of the same shape or those of a GGUF file; nothing is fetched.
"""

import json
import pathlib
import sys
import time

import torch
import transformers
import worker

THREADS = 2


def make_model(shape: dict, gguf: str | None):
  """A Llama that never ends a row."""
  if gguf:
    path = pathlib.Path(gguf)
    model = transformers.AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32
    )
  else:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_mlp"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_length"],
        rms_norm_eps=shape["norm_eps"],
        rope_theta=shape["rope_base"],
        tie_word_embeddings=shape["tie_embeddings"],
      )
    )
  model.generation_config.eos_token_id = None
  return model.eval()


@torch.inference_mode()
def generate(model, batch: int, prompt: int, num_tokens: int) -> tuple[float, float]:
  """Wall and CPU milliseconds of sampling so many tokens a row."""
  token_BP = torch.randint(0, model.config.vocab_size, (batch, prompt))
  whole = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
  before = time.perf_counter(), time.process_time()
  token_BL = model.generate(
    token_BP,
    attention_mask=torch.ones_like(token_BP),
    max_new_tokens=num_tokens,
    pad_token_id=0,
    **whole,
  )
  wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
  if token_BL.shape != (batch, prompt + num_tokens):
    raise ValueError(
      f"generate gave {tuple(token_BL.shape)}, {num_tokens} new tokens were asked for"
    )
  return 1e3 * wall, 1e3 * cpu


def main():
  worker.claim_stdout()
  torch.set_num_threads(THREADS)
  task = json.loads(sys.argv[1])
  model = make_model(task["model"], task["gguf"])
  prompt, few, many = task["tokens"]

  def once() -> dict:
    found = {}
    for batch in task["batches"]:
      short, long = (generate(model, batch, prompt, num_tokens) for num_tokens in (few, many))
      for kind, a, b in zip(("ms", "cpu_ms"), short, long):
        found[f"batch_{batch}_step_{kind}"] = (b - a) / (many - few)
    return found

  for batch in task["batches"]:
    generate(model, batch, prompt, few)
  parameters = sum(weight.numel() for weight in model.parameters())
  versions = {"torch": torch.__version__, "transformers": transformers.__version__}
  worker.serve(once, {"parameters": parameters} | versions)


if __name__ == "__main__":
  main()
