"""What a run does about checkpoints that are damaged or half there.

Called by checkpoint.py. Whether one is, the manifest says (manifest.py). Nothing that a user may still want is deleted:
folders are renamed, and a line on stderr says so.
"""

import itertools
import pathlib
import shlex
import shutil
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructjax.core.errors import UserError, writing
from instructjax.train import finished, manifest

FOLDER = "checkpoints"  # inside the directory of a stage
META = "meta/metadata"  # inside a checkpoint


def saved_steps(directory: pathlib.Path) -> list[int]:
  """The steps of a stage's checkpoints of which no part is missing, ascending; their bytes are not read."""
  folder = pathlib.Path(directory) / FOLDER
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    if path.name.isdigit() and not manifest.find_half(path)
  )


def put_aside(directory: pathlib.Path):
  """Clears what orbax left half-written, and puts checkpoints aside that a run must not go on from.

  Raises:
    UserError: the newest checkpoint is damaged, and there is none before it.
  """
  folder = directory / FOLDER
  first = jax.process_index() == 0
  if first:
    for path in folder.iterdir():
      if ".orbax-checkpoint-tmp" in path.name:
        shutil.rmtree(path, ignore_errors=True)
      elif path.name.isdigit():
        half = manifest.find_half(path)
        # Perhaps a user's broken copy, perhaps a renaming that a mount did not finish, or a deletion that was killed.
        if half and half.fault != manifest.OTHER_BYTES:
          _rename(path, "incomplete", f"{half}")
  while True:
    # As process 0 sees them: a mount may show the others what it was before.
    step, earlier = _newest(directory)
    damage = manifest.find_damage(folder / str(step)) if step >= 0 else None
    if not damage:
      return
    if earlier < 0:
      raise UserError(f"{damage}, and there is no checkpoint before it. {advice(directory, step)}")
    if first:
      _rename(folder / str(step), "damaged", f"{damage}; going on from step {earlier}")


def _newest(directory: pathlib.Path) -> tuple[int, int]:
  """The newest two checkpoints' steps, -1 where there is none; the same in all processes, and they wait for it."""
  names = [path.name for path in (directory / FOLDER).iterdir()]
  steps = sorted([-1, -1, *(int(name) for name in names if name.isdigit())])
  earlier, newest = multihost_utils.broadcast_one_to_all(np.array(steps[-2:], np.int32))
  return int(newest), int(earlier)


def _rename(path: pathlib.Path, name: str, why: str):
  """Renames a checkpoint so that it no longer counts, and says so."""
  aside = next(
    free
    for number in itertools.count(1)
    if not (free := path.with_name(f"{path.name}.{name}{number if number > 1 else ''}")).exists()
  )
  with writing(path):
    path.rename(aside)
  print(f"checkpoint {path.name} is put aside as {aside.name}: {why}", file=sys.stderr, flush=True)


def advice(directory: pathlib.Path, step: int) -> str:
  """How to go on without the checkpoint of a step, in words that work when they are followed to the letter.

  Later checkpoints go too: from them a run would not come by the damaged step again, which is perhaps the one that
  later stages start from. done.json goes, so that the stage is run again.
  """
  directory = pathlib.Path(directory)
  folder = directory / FOLDER
  found = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
  paths = [folder / str(other) for other in found if other >= step]
  if (directory / finished.DONE).exists():
    paths.insert(0, directory / finished.DONE)
  earlier = [other for other in saved_steps(directory) if other < step]
  start = f"goes on from step {earlier[-1]}" if earlier else "starts at its beginning"
  removal = f"run `rm -r {shlex.join(map(str, paths))}` and" if paths else "run"
  return (
    f"If it is a copy, copy it again. Else {removal} the main job again: this stage {start} and comes to the same"
    " numbers."
  )
