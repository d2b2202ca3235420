"""Holds a trainer of transformers' kind in its own loop between two steps, until the benchmark says go.

Called by trl_sft.py and trl_ppo.py, whose trainers run in the main thread. One call of train() makes all repetitions,
so that what it does once a call is not counted.
"""

import contextlib
import queue
import threading
from collections.abc import Callable

import transformers


class _Ended(Exception):
  """No more steps are wanted, or none will come."""


class Gate(transformers.TrainerCallback):
  """Lets one step of a training loop through at a time."""

  def __init__(self):
    self._go, self._done = queue.Queue(), queue.Queue()

  def on_train_begin(self, args, state, control, **kwargs):
    self._wait()

  def on_step_end(self, args, state, control, **kwargs):
    self._done.put(True)
    self._wait()

  def _wait(self):
    # Not control.should_training_stop, which TRL's PPO does not look at.
    if not self._go.get():
      raise _Ended

  def step(self):
    """Lets one step through and waits for its end. Called in another thread than the trainer's."""
    self._go.put(True)
    if not self._done.get():
      raise _Ended

  def hold(self, train: Callable[[], None], serve: Callable[[], None]):
    """Runs `train` in this thread, and `serve`, which calls `step`, beside it; ends with both."""

    def beside():
      try:
        serve()
      finally:
        self._go.put(False)

    threading.Thread(target=beside).start()
    try:
      with contextlib.suppress(_Ended):
        train()
    finally:
      self._done.put(False)  # also if it failed: `step` must not wait for ever
