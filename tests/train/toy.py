"""A stage of a few numbers, for tests of the loop and of what it is made of."""

import functools
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructjax.core.config import CheckpointConfig, LogConfig, ProfileConfig
from instructjax.core.structs import TrainState
from instructjax.train.loop import fit
from instructjax.train.metrics import MEASURED, read_metrics
from instructjax.train.stage_runs import StageRun
from instructjax.train.tracking import Tracking

TX = optax.adam(1e-2)
FINGERPRINT = {"config": "c" * 64, "reference": "r" * 64}
EXECUTION = {"execution.dtype": "float32", "execution.remat": "none", "ppo.packed_rows": 0}


class Rows:
  """Batches shuffled anew each pass, with a position that can be saved, as the pipeline's are.

  `kill_at` makes the process die by SIGKILL while that batch is drawn.
  """

  def __init__(self, kill_at=None):
    self._drawn, self._kill_at = 0, kill_at

  def __next__(self):
    self._drawn += 1
    if self._drawn == self._kill_at:
      os.kill(os.getpid(), signal.SIGKILL)
    epoch, row = divmod(self._drawn - 1, 5)
    return np.random.default_rng(epoch).permutation(5)[row].astype(np.float32)

  def get_state(self):
    return {"drawn": self._drawn}

  def set_state(self, state):
    self._drawn = state["drawn"]


def new_state(seed=0):
  params = {"w_D": jax.random.normal(jax.random.key(seed), (16,))}
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=TX.init(params), key=jax.random.key(seed + 1)
  )


@functools.partial(jax.jit, donate_argnums=0)
def step(state, x):
  """Noise from the state's key, Adam, a target from the batch: all that a resume can lose."""
  noise_D = jax.random.normal(jax.random.fold_in(state.key, state.step), (16,))
  loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w_D"] + 0.1 * noise_D - x) ** 2))(
    state.params
  )
  updates, opt_state = TX.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "kl": 10.0 * state.step}
  return TrainState(state.step + 1, params, opt_state, state.key), metrics


def stage_run(
  directory,
  *,
  every=3,
  keep=2,
  log=4,
  fingerprint=FINGERPRINT,
  profile="",
  libraries=(),
  tracking=None,
  **execution,
):
  return StageRun(
    started=0.0,
    name="toy",
    directory=pathlib.Path(directory),
    checkpoint=CheckpointConfig(every_steps=every, keep=keep),
    log=LogConfig(every_steps=log, samples=1, trackers=(), project="", run_name="", offline=True),
    profile=ProfileConfig(profile),
    tracking=Tracking(()) if tracking is None else tracking,
    fingerprint=fingerprint,
    files={},
    changeable={
      "rounding": EXECUTION | execution,
      "same numbers": {"ppo.max_kl": 1.0},
      "libraries": {"jax": "0.10.2", "numpy": "2.4.6"} | dict(libraries),
    },
  )


def train(directory, *, num_steps=10, step_fn=step, batches=None, run=None, **kwargs):
  """`fit` with the toy, in the folder."""
  kwargs.setdefault("progress", False)
  run = run or stage_run(directory)
  return fit(run, new_state(), step_fn, batches or Rows(), num_steps=num_steps, **kwargs)


def bytes_of(state):
  leaves = (state.step, state.params, state.opt_state, jax.random.key_data(state.key))
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(leaves)]


def records(directory):
  return [
    {k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in read_metrics(directory)
  ]


def killed_run(directory):
  """Entry of a subprocess of test_loop.py: dies while it draws the 9th batch."""
  train(directory, batches=Rows(kill_at=9), num_steps=10)
