"""Measures what `memory.keep_freed_memory` saves: CPU time of a training step with it and without it, in turn.

  python -m benchmarks.malloc --repeats=3

Prints one JSON line: medians of CPU milliseconds (user + system) and of page faults per step, and the ratio of the CPU
times. Each measurement is a process of its own, because malloc is set up only once in a process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

STEPS = 20
ROWS, LENGTH, VOCAB = 16, 64, 2000  # the tiny preset's pretraining batch


def measure(keep: bool) -> dict:
  """CPU milliseconds and page faults per step, after compilation.

  Args:
    keep: whether malloc keeps freed memory.
  """
  from instructjax.parallel import memory

  if keep and not memory.keep_freed_memory():
    raise SystemExit("this C library is not glibc: there is nothing to measure")
  # Only now: malloc has to be set up before JAX allocates anything.
  import jax
  import numpy as np

  from configs import models
  from instructjax.core.config import from_config_dict
  from instructjax.core.structs import PackedBatch
  from instructjax.models import model_on
  from instructjax.parallel import sharding
  from instructjax.train import supervised
  from instructjax.train.optim import make_optimizer

  cfg = from_config_dict(models.get("pretrain", None))
  mesh = sharding.make_mesh(cfg.mesh)
  model = model_on(mesh, cfg.model.network, cfg.execution, VOCAB, "lm")
  with jax.set_mesh(mesh):
    tx = make_optimizer(cfg.pretrain.optim, cfg.pretrain.num_steps)
    params = supervised.init_params(mesh, model, jax.random.key(0))
    state, shardings = supervised.create_state(mesh, model, tx, params, jax.random.key(1))
    step = supervised.make_lm_train_step(model, tx, dropout_rate=0.0, state_shardings=shardings)
    token_BL = np.random.default_rng(0).integers(VOCAB, size=(ROWS, LENGTH)).astype(np.int32)
    position_BL = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    weight_BL = np.ones((ROWS, LENGTH), np.float32)
    batch = sharding.place_batch(
      mesh, PackedBatch(token_BL, np.ones_like(token_BL), position_BL, weight_BL)
    )
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
    after = resource.getrusage(resource.RUSAGE_SELF)
  seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  return {
    "cpu_ms": 1e3 * seconds / STEPS,
    "faults": (after.ru_minflt - before.ru_minflt) / STEPS,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--child", choices=("default", "kept"))
  args = parser.parse_args()
  if args.child:
    print(json.dumps(measure(args.child == "kept")))
    return
  runs = {"default": [], "kept": []}
  for _ in range(args.repeats):
    for name, results in runs.items():
      command = [sys.executable, "-m", "benchmarks.malloc", f"--child={name}"]
      output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
      results.append(json.loads(output.splitlines()[-1]))
  medians = {
    name: {key: round(statistics.median(r[key] for r in results), 1) for key in results[0]}
    for name, results in runs.items()
  }
  ratio = medians["kept"]["cpu_ms"] / medians["default"]["cpu_ms"]
  print(json.dumps({"benchmark": "malloc", **medians, "cpu_ratio": round(ratio, 3)}))


if __name__ == "__main__":
  main()
