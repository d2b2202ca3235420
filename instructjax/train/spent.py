"""What a stage's time went into besides its steps: compiling, input, saves, evaluations, restoring, work done again.

Called by the loop, which puts the seconds into metrics.jsonl as `seconds/KIND`; report/costs.py adds them up.
"""

import collections
import contextlib
import time
from collections.abc import Generator
from typing import Any, Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # name of the event in jax.monitoring
_WORTH = 1e-3  # seconds from which on they are told


class Spent:
  """Adds up the seconds of each kind since they were last taken; as a context manager, those of compiling too.

  The kinds do not overlap: what is compiled in an evaluation counts as compiling.
  """

  def __init__(self):
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._compiled = 0.0

  def __enter__(self) -> Self:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exception: Any):
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int):
    if event == _COMPILED:
      self._compiled += duration_secs
      self.add("compile", duration_secs)

  def add(self, kind: str, seconds: float):
    """Counts seconds that were measured elsewhere."""
    self._seconds[kind] += seconds

  @contextlib.contextmanager
  def on(self, kind: str) -> Generator[None, None, None]:
    """Around what is of this kind."""
    began, compiled = time.monotonic(), self._compiled
    yield
    self.add(kind, max(time.monotonic() - began - (self._compiled - compiled), 0.0))

  def take(self) -> dict[str, float]:
    """`seconds/KIND` -> seconds since the last call; kinds of less than a millisecond wait for the next."""
    worth = {kind: value for kind, value in self._seconds.items() if value >= _WORTH}
    for kind in worth:
      del self._seconds[kind]
    return {f"seconds/{kind}": round(value, 4) for kind, value in worth.items()}
