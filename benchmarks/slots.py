"""Measures what continuous batching saves: a rollout of answers of very different lengths, by number of slots.

  python -m benchmarks.slots --repeats=5

A rollout has 64 prompts of 16 tokens and at most 512 new tokens for each. The model has 4 layers of width 256, a
vocabulary of 64 and random weights, so that each token ends an answer with a chance of about 1/64.

Prints one JSON line: for each number of slots (64 is the whole batch at once) medians of wall and CPU seconds (user +
system) of a rollout, the mean share of decoded tokens that were wasted, the mean number of decode steps, and the CPU
seconds of the compilation. Numbers of slots take turns. Each repeat has a key of its own, which is the same for all of
them; if their tokens differ, the command ends.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import models as presets
from instructjax.core.config import from_config_dict
from instructjax.core.structs import PromptBatch
from instructjax.models import model_on, transformer
from instructjax.rl import sampling

ROWS, PROMPT, RESPONSE, VOCAB, EOS = 64, 16, 512, 64, 0


def make_model() -> transformer.Model:
  """A small model of Llama's architecture, except for its MLP (GELU). The head is not tied to the embeddings."""
  config = from_config_dict(presets.get("ppo", "smollm2_135m"))
  network = dataclasses.replace(
    config.model.network,
    num_layers=4,
    d_model=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    d_mlp=1024,
    max_length=PROMPT + RESPONSE,
    rope_base=1e4,
    mlp="gelu",
    tie_embeddings=False,
    init_std=0.02,
  )
  return model_on(None, network, config.execution, VOCAB, "lm")


def seconds() -> dict[str, float]:
  """Wall and CPU seconds of this process so far."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return {"wall_s": time.perf_counter(), "cpu_s": usage.ru_utime + usage.ru_stime}


def timed(function, *args):
  """Calls the function; returns (its result, wall and CPU seconds)."""
  before = seconds()
  result = jax.block_until_ready(function(*args))
  return result, {name: value - before[name] for name, value in seconds().items()}


def compiled(model, params, prompts, slots: int):
  """Compiles (params, prompts, key) -> Rollout for a number of slots."""

  def run(params, prompts, key):
    kwargs = dict(max_new_tokens=RESPONSE, stop_ids=(EOS,), temperature=1.0, slots=slots)
    return sampling.generate(model, params, prompts, key, **kwargs)

  return jax.jit(run).lower(params, prompts, jax.random.key(0)).compile()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--slots", type=int, nargs="+", default=[ROWS, 32, 16, 8])
  args = parser.parse_args()
  model = make_model()
  params = transformer.init_params(model, jax.random.key(0))
  token_BP = np.random.default_rng(0).integers(1, VOCAB, (ROWS, PROMPT)).astype(np.int32)
  prompts = jax.device_put(PromptBatch(token_BP, token_BP > 0, np.arange(ROWS, dtype=np.int32)))
  programs, runs, tokens = {}, {}, []
  for slots in args.slots:
    programs[slots], cost = timed(compiled, model, params, prompts, slots)
    runs[slots] = {"compile_cpu_s": [cost["cpu_s"]]}
    timed(programs[slots], params, prompts, jax.random.key(0))  # the first run takes fresh memory
  for repeat in range(args.repeats):
    sampled = []
    for slots, program in programs.items():
      rollout, cost = timed(program, params, prompts, jax.random.key(1 + repeat))
      sampled.append(rollout.token_BL)
      num_tokens = int(jnp.sum(rollout.is_response_BR))
      cost |= {"wasted": 1 - num_tokens / int(rollout.slot_steps), "steps": int(rollout.num_steps)}
      for name, value in cost.items():
        runs[slots].setdefault(name, []).append(value)
    tokens.append(num_tokens)
    if not all(np.array_equal(x, sampled[0]) for x in sampled):
      raise SystemExit(f"repeat {repeat}: the tokens depend on the slots")
  middle = {"wasted": statistics.mean, "steps": statistics.mean}
  table = {
    slots: {name: round(middle.get(name, statistics.median)(xs), 3) for name, xs in costs.items()}
    for slots, costs in runs.items()
  }
  print(json.dumps({"benchmark": "slots", "tokens": statistics.mean(tokens), "slots": table}))


if __name__ == "__main__":
  main()
