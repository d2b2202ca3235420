"""Compiles training steps with more and more microbatches, and prints the memory that each needs at its peak.

  python -m benchmarks.microbatches --counts 1 2 4 8

Networks have GPT-2 small's shape, in float32, on one CPU device: `sft` on 16 rows of 256 tokens, `rm` on 8 prompts of 4
answers in rows of 256, `ppo_ptx` on 16 episodes of 128 + 128 tokens in one minibatch, with 16 pretraining rows of 256.
A count is the number of microbatches of all that a stage takes in parts. Nothing runs: the figures are the compiler's.

Prints one JSON line for each stage and count: GB of the step's arguments (weights, optimisers, the batch), and GB of
the temporary arrays that exist at once beside them.
"""

import argparse
import json

import jax

from configs import models
from instructjax.core.config import Config, MeshConfig, from_config_dict
from instructjax.parallel import sharding
from launch import programs

STAGES = ("sft", "rm", "ppo_ptx")


def make_config(stage: str, count: int, **model) -> Config:
  """The preset gpt2 with this number of microbatches; `model` changes the networks."""
  config = models.get(stage, "gpt2")
  config.model.update(model)
  config.reward_model.update(model)
  # As on a CPU: the planner's programs are a TPU's otherwise.
  config.execution.update(
    dtype="float32", layers="unroll", attention="plain", remat="none", decode_layout="tensor"
  )
  config.data.update(max_prompt_length=128, max_response_length=128)
  config.sft.update(batch_size=16, length=256, microbatches=count)
  config.rm.update(batch_size=8, max_responses=4, microbatches=count)
  config.collect.update(max_responses=4)
  config.ppo.update(
    batch_size=16,
    num_minibatches=1,
    microbatches=count,
    score_microbatches=count,
    ptx_microbatches=count,
    ptx_rows=1,
    ptx_length=256,
    ema_decay=0.0,
  )
  return from_config_dict(config)


def measure(config: Config) -> dict[str, float]:
  """GB of the step of `config.stage`, as compiled for one CPU device."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = programs.make(config, mesh, config.stage)
    found = program.step.lower(*program.arguments).compile().memory_analysis()
  return {
    "arguments_gb": round(found.argument_size_in_bytes / 1e9, 2),
    "temporaries_gb": round(found.temp_size_in_bytes / 1e9, 2),
  }


def main(argv: list[str] | None = None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
  parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
  args = parser.parse_args(argv)
  for stage in args.stages:
    for count in args.counts:
      found = measure(make_config(stage, count))
      line = {"benchmark": "microbatches", "stage": stage, "microbatches": count}
      print(json.dumps(line | found), flush=True)


if __name__ == "__main__":
  main()
