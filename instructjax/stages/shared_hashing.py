"""Several processes hash the files that they read together: each file once, not once in every process.

Where 64 hosts read weights of 16 GB from a bucket, each would read all of them for their checksum alone. Files on a
host's own disk are hashed there: they may be other copies. Called by contents.py.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping

from instructjax.data import file_places
from instructjax.data.checksums import FileChecksums
from instructjax.parallel import agreement
from instructjax.parallel.watchdog import Team


def share(team: Team, name: str, checksums: FileChecksums, paths: Iterable[str]):
  """Makes sure that `checksums` knows the files, with this process hashing only its part of them.

  All processes must call it, each with its own paths. A file that cannot be read is left out: whoever asks for its
  checksum meets the error.

  Args:
    team: the processes.
    name: what the files are, in words; used once in a run.
    checksums: of this process.
    paths: the files.
  """
  ours: dict[str, str] = {}  # identity -> path
  said: dict[str, tuple[int, str | None]] = {}  # identity -> bytes, remembered checksum
  for path in paths:
    with contextlib.suppress(OSError):
      file = file_places.identity(path)
      said[file] = os.path.getsize(path), checksums.known(path)
      ours[file] = path
  plan = agreement.decide(team, f"who hashes {name}", said, _plan)
  digests: dict[str, str | None] = {}
  for file, process in plan.items():
    if process == team.process:
      with contextlib.suppress(OSError):
        checksums.content("", [ours[file]])
        # One that is being written is not remembered, and each process meets it by itself.
        digests[file] = checksums.known(ours[file])
  found = agreement.decide(team, f"checksums of {name}", digests, _union)
  for file in ours.keys() & found.keys():
    checksums.learn(ours[file], file, found[file])


def _plan(said: Mapping[int, Mapping[str, tuple[int, str | None]]]) -> dict[str, int]:
  """Who hashes which file: its identity -> process.

  The largest files first, each by the process with the least to do of those that have it; one that some process knows,
  by that one, for which it is no work.
  """
  holders: dict[str, list[int]] = {}
  sizes: dict[str, int] = {}
  knowing: dict[str, int] = {}
  for process in sorted(said):
    for file, (size, digest) in said[process].items():
      holders.setdefault(file, []).append(process)
      sizes[file] = size
      if digest:
        knowing.setdefault(file, process)
  work, plan = dict.fromkeys(said, 0), {}
  for file in sorted(holders, key=lambda file: (-sizes[file], file)):
    process = knowing.get(file)
    if process is None:
      process = min(holders[file], key=lambda one: (work[one], one))
      work[process] += sizes[file]
    plan[file] = process
  return plan


def _union(said: Mapping[int, Mapping[str, str | None]]) -> dict[str, str]:
  return {file: digest for own in said.values() for file, digest in own.items() if digest}
