"""Step times while a checkpoint is written, and while none is: 30 steps of training, with a save after each 5.

  python -m benchmarks.save_overlap --megabytes=200 --steps=30 --every=5

A network of one matrix is trained by Adam; weights and moments are the checkpoint, of about so many megabytes. A step
takes about half a second of both cores. Prints one JSON line, from the run's own metrics.jsonl:
  - beside: median seconds of steps that began while a checkpoint was being written, quiet: of the others;
  - save: median seconds that the loop waited in `save`;
  - checkpoint: median seconds until a checkpoint was whole on the disk, and its bytes;
  - lost: seconds by kind, as report/costs.py adds them up, and the share of the time that steps took.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import models as presets
from instructjax.core import provenance
from instructjax.core.config import from_config_dict
from instructjax.core.structs import TrainState
from instructjax.report import costs
from instructjax.train import loop, metrics, stage_runs
from instructjax.train.tracking import Tracking

WIDTH, PASSES = 2048, 1  # a step goes over the layers so many times


class Batches:
  """A batch of ones, again and again."""

  def __next__(self):
    return np.ones((256, WIDTH), np.float32)

  def get_state(self):
    return 0

  def set_state(self, state):
    del state


def told(rows: list[dict], every: int, seconds: float) -> dict:
  """The numbers of the docstring, from the rows of metrics.jsonl."""
  beside, quiet, until = [], [], 0.0
  saves = {row["step"]: row["checkpoint/seconds"] for row in rows if "checkpoint/seconds" in row}
  clock = 0.0
  for row in rows[1:]:  # the first one compiles
    # A line has the seconds of its own step; that after a save, those of the call of `save` too.
    took = row["seconds"] - row.get("seconds/save", 0.0)
    (beside if clock < until else quiet).append(took)
    clock += row["seconds"]
    if row["step"] % every == 0:
      written = min((step for step in saves if step > row["step"]), default=None)
      until = clock + (saves[written] if written else 0.0)
  waited = [row["seconds/save"] for row in rows if "seconds/save" in row]
  made = provenance.collect({}, jax.devices(), 1, seconds)
  cost = costs.of_stage(rows, made)
  middle = lambda values: round(statistics.median(values), 3) if values else None
  return {
    "beside": middle(beside),
    "steps beside": len(beside),
    "quiet": middle(quiet),
    "steps quiet": len(quiet),
    "save": middle(waited),
    "checkpoint": middle(saves.values()),
    "bytes": max(row.get("checkpoint/bytes", 0) for row in rows),
    "lost": {kind: round(value, 2) for kind, value in cost.beside.items()},
    "goodput": round(cost.goodput, 3),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=200)
  parser.add_argument("--steps", type=int, default=30)
  parser.add_argument("--every", type=int, default=5)
  flags = parser.parse_args()
  layers = max(round(flags.megabytes * 1e6 / (12 * WIDTH**2)), 1)
  tx = optax.adam(1e-4)
  weight = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
  params = {"w": [weight(key) for key in jax.random.split(jax.random.key(0), layers)]}
  state = TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(1))

  def loss(params, batch):
    for _ in range(PASSES):
      for w in params["w"]:
        batch = jnp.tanh(batch @ w)
    return jnp.mean(batch**2)

  def step(state, batch):
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(state.step + 1, params, opt_state, state.key)
    return new, {"loss": value, "gradient_norm": optax.global_norm(grads)}

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / "run"
    base = from_config_dict(presets.get("sft", "tiny"))
    run = stage_runs.StageRun(
      name="run",
      directory=folder,
      checkpoint=dataclasses.replace(base.checkpoint, every_steps=flags.every, keep=2),
      log=base.log,
      profile=base.profile,
      tracking=Tracking(()),
      fingerprint={},
      files={},
      changeable={"rounding": {}, "same numbers": {}, "libraries": {}},
      started=time.monotonic(),
    )
    jitted = jax.jit(step, donate_argnums=0)
    loop.fit(run, state, jitted, Batches(), num_steps=flags.steps, progress=False)
    print(
      json.dumps(told(metrics.read_metrics(folder), flags.every, time.monotonic() - run.started))
    )


if __name__ == "__main__":
  main()
