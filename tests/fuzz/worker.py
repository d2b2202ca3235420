"""The process that tries inputs for the fuzz command, one after the other, and says what came of each.

It limits its own memory. Its time is watched from outside, because a loop in C listens to nobody.
"""

import gc
import logging
import multiprocessing.connection
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from instructjax.core.errors import UserError
from tests.fuzz import mutants, targets

ACCEPTED, REFUSED, EXCEPTION = "accepted", "refused", "exception"
_PACKAGE = pathlib.Path(mutants.__file__).parents[2]
_ROOM = 4  # times the limit: address space beyond what the process has at its start


class Outcome(NamedTuple):
  """What came of an input.

  Attributes:
    kind: accepted, refused or exception.
    what: the exception and its message, or what is wrong with a refusal's.
    where: the innermost line of this project that raised it, as `instructjax/data/bpe.py:12`.
    seconds: processor time.
    bytes: resident memory at its peak, beyond what there was before.
  """

  kind: str
  what: str = ""
  where: str = ""
  seconds: float = 0.0
  bytes: int = 0


def attempt(run: Callable[[pathlib.Path], object], folder: pathlib.Path) -> Outcome:
  """What comes of reading the files of a folder."""
  resident = _reset_peak()
  began = time.process_time()
  try:
    run(folder)
    outcome = Outcome(ACCEPTED)
  except UserError as error:
    found = mutants.bad_message(error, folder)
    outcome = Outcome(EXCEPTION, found, _where(error)) if found else Outcome(REFUSED)
  except BaseException as error:  # SystemExit too
    text = f"{type(error).__name__}: {ascii(str(error))[:200]}"
    outcome = Outcome(EXCEPTION, text, _where(error))
  seconds = time.process_time() - began
  return outcome._replace(seconds=seconds, bytes=_status("VmHWM") - resident)


def _where(error: BaseException) -> str:
  lines = traceback.extract_tb(error.__traceback__)
  ours = [line for line in lines if line.filename.startswith(f"{_PACKAGE}/")] or lines[-1:]
  own = [line for line in ours if f"{_PACKAGE}/instructjax/" in line.filename] or ours
  return f"{own[-1].filename.removeprefix(f'{_PACKAGE}/')}:{own[-1].lineno}" if own else ""


def _reset_peak() -> int:
  """Makes the peak of resident memory start anew; bytes that are resident now."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return _status("VmRSS")


def _status(name: str) -> int:
  """Bytes of a row of this process's status."""
  text = pathlib.Path("/proc/self/status").read_text()
  return int(text.partition(f"{name}:")[2].split(maxsplit=1)[0]) << 10


def serve(pipe: multiprocessing.connection.Connection, gigabytes: float):
  """Takes (target, seed, numbers) from the pipe and sends an Outcome's values for each number, until it gets None."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command itself
  null = os.open(os.devnull, os.O_RDWR)
  for stream in (0, 1, 2):  # readers of C++ complain there, and --help prints
    os.dup2(null, stream)
  logging.disable(logging.CRITICAL)
  warnings.simplefilter("ignore")
  with tempfile.TemporaryDirectory() as scratch:
    # What is loaded or compiled once counts for no input.
    for name in targets.TARGETS:
      for _ in _outcomes(name, 0, range(3), pathlib.Path(scratch)):
        pass
    gc.collect()
    gc.freeze()  # the readers of damaged files collect garbage, and all modules are no garbage
    size = _status("VmSize") + int(_ROOM * gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(_status("VmRSS"))
    while task := pipe.recv():
      for outcome in _outcomes(*task, pathlib.Path(scratch)):
        pipe.send(tuple(outcome))


def _outcomes(name: str, seed: int, numbers: range, scratch: pathlib.Path) -> Iterator[Outcome]:
  for number in numbers:
    folder = scratch / "input"
    folder.mkdir()
    mutants.write(folder, targets.case(name, seed, number))
    yield attempt(targets.TARGETS[name].run, folder)
    shutil.rmtree(folder)
