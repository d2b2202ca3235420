"""Tells on stderr what the planner is doing while it takes its minutes. Called by planning.py and search.py."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_EVERY = 30.0  # seconds between two lines


def say(line: str):
  """Prints a line on stderr, where it does not mix with the report."""
  print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def telling(what: str, every: float = _EVERY) -> Iterator[None]:
  """Says what begins, then at intervals how long it has taken, and at the end how long it took."""
  say(f"{what} ...")
  start, ended = time.monotonic(), threading.Event()

  def tell():
    while not ended.wait(every):
      say(f"{what}: {time.monotonic() - start:.0f} s so far")

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    say(f"{what}: took {time.monotonic() - start:.0f} s")
