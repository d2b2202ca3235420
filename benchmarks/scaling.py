"""Measures how cost grows: CPU seconds as batch, length and number of layers are doubled twice, one at a time.

  python -m benchmarks.scaling --repeats=5

Three programs of a small model (width 256, vocabulary 512) are measured:
  - `sft`: a training step;
  - `ppo`: an iteration of 4 minibatches and one epoch, in which half of the length is prompt and half is answer;
  - `decode`: 16 decode steps, in which the length is the number of columns in the cache.

Prints a table as it goes and one JSON line: medians of CPU seconds (user + system) of a run and of the compilation, and
the exponents fitted to them (the slope between logarithms; 1 is linear, 0 is flat). The sizes are chosen to keep small
what does not grow with an axis: the optimiser does not grow with the batch, nor the head with the layers. Other
exponents than 1 are expected for the length, since a part of attention is quadratic in it, and for the cache's columns,
which only attention reads.

Layers are unrolled, as `execution.layers=auto` has them on a CPU. `sft scan` and `decode scan` use
`execution.layers=scan`, which compiles one layer, however many there are. The compilation's seconds are those of the
first run less those of a median run.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ppo_iteration, sft_step
from configs import models
from instructjax.core.config import from_config_dict
from instructjax.models import decoding, model_on, transformer
from instructjax.parallel import memory, sharding

MODEL = dict(d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_mlp=1024)
VOCAB, DECODE_STEPS = 512, 16


@dataclasses.dataclass(frozen=True)
class Size:
  """The three axes along which a program is scaled."""

  batch: int
  length: int
  layers: int


BASE = {"sft": Size(16, 128, 4), "ppo": Size(64, 32, 2), "decode": Size(64, 256, 4)}
FACTORS = (1, 2, 4)


def make_config(size: Size, layers: str):
  """The preset gpt2 with these sizes and this setting of `execution.layers`."""
  config = models.get("sft", "gpt2")
  config.model.update(MODEL | dict(num_layers=size.layers, max_length=2048))
  config.execution.update(layers=layers, remat="none")
  return from_config_dict(config)


def sft(size: Size, layers: str) -> Callable:
  """Makes a function that runs a training step."""
  shape = (size.batch, size.length)
  token_BL = np.random.default_rng(0).integers(VOCAB, size=shape).astype(np.int32)
  train, _ = sft_step.make_training(make_config(size, layers), VOCAB, token_BL)
  return train


def ppo(size: Size, layers: str) -> Callable:
  """Makes a function that runs a PPO iteration in which no answer ends before its limit."""
  half = size.length // 2
  network = MODEL | {"num_layers": size.layers}
  load = ppo_iteration.Workload(network, VOCAB, half, half, size.batch, 4, 1, ends=False)
  return ppo_iteration.prepare(load, {"execution.layers": layers})


def decode(size: Size, layers: str) -> Callable:
  """Makes a function that runs the decode steps which fill the last columns of a cache.

  No prompt is read into the earlier columns, which makes no difference to the cost.
  """
  cfg = make_config(size, layers)
  mesh = sharding.make_mesh(cfg.mesh)
  jax.set_mesh(mesh)
  model = model_on(mesh, cfg.model.network, cfg.execution, VOCAB, "lm")
  params = transformer.init_params(model, jax.random.key(0))
  weights = jax.jit(lambda params: decoding.decode_weights(model, params))(params)
  column_BT = np.tile(np.arange(size.length), (size.batch, 1))

  def steps(weights, token_B, cache):
    def step(slot, carry):
      token_B, cache = carry
      position_B = jnp.full_like(token_B, slot)
      logits_BV, cache = decoding.decode_step(
        model, weights, token_B, position_B, slot, column_BT <= slot, cache
      )
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(size.length - DECODE_STEPS, size.length, step, (token_B, cache))

  steps = jax.jit(steps, donate_argnums=(1, 2))
  state = jnp.zeros(size.batch, jnp.int32), decoding.init_cache(model, size.batch, size.length)

  def once():
    nonlocal state
    state = jax.block_until_ready(steps(weights, *state))

  return once


PROGRAMS = {"sft": sft, "ppo": ppo, "decode": decode}


def cpu_seconds(once: Callable) -> float:
  """CPU seconds, user and system, of one run."""
  before = time.process_time()
  once()
  return time.process_time() - before


def measure(runs: list[Callable], repeats: int) -> list[dict]:
  """Runs programs in turn, for the first time and then `repeats` times more.

  Returns:
    For each program the CPU seconds of a median run, and those by which the first run, which compiles, took longer.
  """
  first = [cpu_seconds(once) for once in runs]
  rounds = [[cpu_seconds(once) for once in runs] for _ in range(repeats)]
  medians = map(statistics.median, zip(*rounds))
  return [{"cpu_s": run, "compile_cpu_s": all_ - run} for run, all_ in zip(medians, first)]


def exponent(values: list[float]) -> float:
  """The slope of log(value) over log(factor)."""
  return float(np.polyfit(np.log(FACTORS), np.log(values), 1)[0])


def scale(program: str, axis: str, layers: str, repeats: int) -> dict:
  """Measures one program along one axis."""
  base = BASE[program]
  sizes = [dataclasses.replace(base, **{axis: f * getattr(base, axis)}) for f in FACTORS]
  found = measure([PROGRAMS[program](size, layers) for size in sizes], repeats)
  gc.collect()  # frees these programs' arrays before the next ones are made
  result = {"program": program + (" scan" if layers == "scan" else ""), "axis": axis}
  result["sizes"] = [getattr(size, axis) for size in sizes]
  for name in ("cpu_s", "compile_cpu_s"):
    values = [one[name] for one in found]
    result[name] = [round(value, 3) for value in values]
    result[name.replace("cpu_s", "exponent")] = round(exponent(values), 2)
  return result


COLUMNS = {
  "program": "program",
  "axis": "axis",
  "sizes": "sizes",
  "cpu_s": "CPU s",
  "exponent": "exponent",
  "compile_cpu_s": "compile CPU s",
  "compile_exponent": "exponent",
}


def print_row(cells: list):
  """Prints a row of the Markdown table."""
  spell = lambda cell: ", ".join(map(str, cell)) if isinstance(cell, list) else str(cell)
  print(f"| {' | '.join(map(spell, cells))} |", flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--program", choices=PROGRAMS, action="append", help="all by default")
  args = parser.parse_args()
  memory.keep_freed_memory()
  results = []
  print_row([*COLUMNS.values()])
  print_row(["---"] * len(COLUMNS))
  for program in args.program or PROGRAMS:
    runs = [("batch", "unroll"), ("length", "unroll"), ("layers", "unroll")]
    if program != "ppo":
      runs.append(("layers", "scan"))
    for axis, layers in runs:
      results.append(scale(program, axis, layers, args.repeats))
      print_row([results[-1][key] for key in COLUMNS])
  print(json.dumps({"benchmark": "scaling", "repeats": args.repeats, "results": results}))


if __name__ == "__main__":
  main()
