"""The sums of a checkpoint's files, each by the process that wrote the file.

At the end of a save, process 0 writes the manifest. Alone it would read what all hosts have written, 840 GB of a 70B
policy's training state, while each host still has its own part in memory. Called by checkpoint.py.
"""

import itertools
import json
import pathlib
import re
import threading
import time
from collections.abc import Sequence

from instructjax.parallel.watchdog import Team
from instructjax.train import manifest

# Orbax gives each process a folder of its own in an item.
_WRITER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")
_PAUSE, _LONGEST_PAUSE = 0.01, 1.0  # seconds between two looks at the store
# Process 0 waits for the others so many times as long as its own part took, and at least so many seconds. Then it sums
# the rest itself.
_PATIENCE, _LEAST_PATIENCE = 3.0, 10.0

# Numbers of the stages whose checkpoints were opened, the same in all processes: they name the place in the store.
_opened = itertools.count(1)


class SharedSums:
  """Sums files together with the other processes, save by save. All processes make one at the same point.

  Args:
    team: the processes; None for a single one.
    folder: the folder of a stage's checkpoints, as this process sees it.
  """

  def __init__(self, team: Team | None, folder: pathlib.Path):
    self._team, self._folder = team, folder
    self._place, self._number = f"sums/{next(_opened)}", 0
    self._is_over = threading.Event()
    self._thread: threading.Thread | None = None

  def expect(self):
    """Says that a save begins, at whose end process 0 asks for sums. All processes must call it."""
    self.close()
    self._number += 1
    if self._team and self._team.process:
      self._is_over.clear()
      args = (self._team, self._number)
      self._thread = threading.Thread(target=self._serve, args=args, name="sums", daemon=True)
      self._thread.start()

  def close(self):
    """Waits for no more questions."""
    self._is_over.set()
    if self._thread:
      self._thread.join()
      self._thread = None

  def of(self, folder: pathlib.Path, names: Sequence[str]) -> manifest.Sums:
    """The sums of files; called by process 0 when all have written.

    Args:
      folder: of the checkpoint, under the name that it has while it is written.
      names: paths in it.
    Raises:
      OSError: a file cannot be read.
    """
    team, began = self._team, time.monotonic()
    if team is None:
      return manifest.sums(folder, names)
    shares = _shares(names, team.num_processes)
    where = str(folder.relative_to(self._folder))
    team.put(f"{self._place}/asked", json.dumps([self._number, where, shares]))
    found = manifest.sums(folder, shares[0])
    asked = {process for process in range(1, team.num_processes) if shares[process]}
    patience = max(_LEAST_PATIENCE, _PATIENCE * (time.monotonic() - began))
    given_up, pause = time.monotonic() + patience, _PAUSE
    while asked and time.monotonic() < given_up:
      for process, text in team.said(f"{self._place}/summed").items():
        number, theirs = json.loads(text)
        if number == self._number and process in asked:
          asked.remove(process)
          found |= {name: (size, checksum) for name, (size, checksum) in theirs.items()}
      if asked:
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)
    # Also what others could not read; if it is gone, it is an error here.
    return found | manifest.sums(folder, [name for name in names if name not in found])

  def _serve(self, team: Team, number: int):
    """Answers the question at the end of one save."""
    pause = _PAUSE
    while not self._is_over.wait(pause):
      pause = min(_LONGEST_PAUSE, 1.5 * pause)
      text = team.said(f"{self._place}/asked").get(0)
      asked, where, shares = json.loads(text) if text else (0, "", [])
      if asked < number:
        continue
      if asked == number and shares[team.process]:
        try:
          found = manifest.sums(self._folder / where, shares[team.process])
        except OSError:  # process 0 reads them itself, and meets the error
          found = {}
        team.put(f"{self._place}/summed", json.dumps([number, found]))
      return


def _shares(names: Sequence[str], num_processes: int) -> list[list[str]]:
  """The files that each process sums: those that it wrote; process 0 also those that none wrote alone."""
  shares: list[list[str]] = [[] for _ in range(num_processes)]
  for name in names:
    writer = _WRITER.search(name)
    process = int(writer[1]) if writer else 0
    shares[process if process < num_processes else 0].append(name)
  return shares
