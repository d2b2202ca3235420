"""Saves, finds and restores training state.

Called by `loop` (save and resume). saved_state.py reads what is saved without going on from it. Knows nothing of models
or stages.

A checkpoint holds the whole state, the position in the data, and what the run was made with. Orbax writes it in the
background. When all processes have written their parts, the manifest is written (see manifest.py), and orbax renames
the folder into place. Whether a checkpoint is whole and undamaged is for the manifest to say, not for its name: some
mounts rename file by file, and a copy may have stopped half-way.

On disk, layers are always stacked on a leading axis, however the model runs them (see stacking.py), so that a run can
go on with another setting of `execution.layers`. Accelerators scan the layers: their state is stacked already and is
written as it is. On a CPU the layers are a list, and a save stacks them first. That stack also serves as the copy which
any save needs, because the next step overwrites the state while the disk is written. It takes no more memory than
orbax's own copy but more time (24 layers of 16 MiB on a CPU: peak memory 392 to 394 MiB above the state either way; a
call of `save` took 0.06 to 0.13 s with orbax's copy and takes 0.55 to 1.3 s with the stack). Storing lists instead
would cost an accelerator a second state beside the one it trains, and a model of 96 layers 96 times as many arrays.
"""

import asyncio
import contextlib
import gc
import os
import pathlib
import shutil
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from instructjax.core.errors import UserError, writing
from instructjax.parallel import distributed, stacking
from instructjax.train import damaged, finished, manifest, reading, saved_state
from instructjax.train.shared_sums import SharedSums

# Arrays of more bytes are cut into chunks, those of layers into one or more a layer: a tensor can be read without
# the rest (streams.py).
_CUT, _CHUNK = 1 << 20, 1 << 24
# Orbax gives up a save after 20 minutes, which a large state may need on a slow disk. A process that is stuck is the
# watchdog's business.
_LONGEST_SAVE = 24 * 3600  # seconds


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Always False, because `distributed` handles SIGTERM.

    All processes agree through JAX on the number of the call at which they stop, and only one caller may number these
    calls. `distributed` counts them; orbax would ask with its own step numbers in between.
    """
    del step
    return False


class _SummedFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """The folder of a checkpoint, or of an item in it, while it is written."""

  sums: SharedSums  # of a subclass for each stage: orbax makes the objects

  async def finalize(self):
    """Renames the folder into place, that of a checkpoint with its manifest. Process 0 calls it after all have
    written.

    Orbax's own would add the time to a file of the checkpoint, and one more file, before it renames.
    """
    if self._checkpoint_metadata_store is None:  # an item
      await super().finalize()
      return
    await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
    await asyncio.to_thread(manifest.write, pathlib.Path(self.get()), self.sums.of)
    await asyncio.to_thread(os.rename, self.get(), self.get_final())


class Checkpoints:
  """The checkpoints of one stage; a context manager, which waits for the disk when it is left.

  On entering, checkpoints that are half there are put aside, and so is the newest one if it is damaged: the one before
  it is then the newest (see damaged.py).

  Args:
    directory: the stage's folder; the checkpoints lie in its subfolder `checkpoints`.
    keep: how many of the newest checkpoints stay.
    keep_steps: steps whose checkpoints are never deleted.
    best_metric: name of a saved metric; the checkpoint with the lowest value of it is never deleted.
  Raises:
    UserError: on entering, if the folder cannot be made, or if the newest checkpoint is damaged and there is none
      before it; on leaving, if a checkpoint could not be written.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int,
    keep_steps: Iterable[int] = (),
    best_metric: str | None = None,
  ):
    self._folder = (pathlib.Path(directory) / damaged.FOLDER).absolute()
    self._keep = keep
    self._keep_steps = frozenset(keep_steps)
    self._best_metric = best_metric
    self._metric = {}  # step -> value of best_metric
    self._saving = None  # step being written
    self._began: float | None = (
      None  # when its save began, by the files' clock; None once `written` has told of it
    )

  def __enter__(self) -> Self:
    with contextlib.ExitStack() as stack:
      # Its errors too: they are raised by `wait`, and the log would show them a second time, with their tracebacks.
      stack.enter_context(reading.quiet_orbax(absl_logging.FATAL))
      with writing(self._folder):
        self._folder.mkdir(parents=True, exist_ok=True)
      damaged.put_aside(self._folder.parent)
      self._sums = SharedSums(distributed.team(), self._folder)
      stack.callback(self._sums.close)
      options = ocp.CheckpointManagerOptions(
        preservation_policy=self,
        create=False,
        temporary_path_class=type("_Folder", (_SummedFolder,), {"sums": self._sums}),
        async_options=ocp.AsyncOptions(timeout_secs=_LONGEST_SAVE),
      )
      self._manager = stack.enter_context(_Manager(self._folder, options=options))
      # A resumed run must still know which earlier step was best, or it would delete that checkpoint.
      for step in self._manager.all_steps():
        self._note_metric(step, saved_state.read_meta(self._folder.parent, step)["metrics"])
      self._open = stack.pop_all()  # nothing failed: __exit__ closes what was opened here
    return self

  def __exit__(self, kind, error, traceback):
    try:
      with writing(self._folder / str(self._saving)), self._open:
        if error is not None:
          gc.collect()  # what a failed save left hanging complains when it is collected: here, where nobody hears it
        self.wait()
    except UserError:
      reading.silence_late_writes()
      # If another error ends the block, that one is raised: it explains more than the failed save.
      if error is None:
        raise
    if error is not None:  # it may be that of a failed save
      reading.silence_late_writes()

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, which is whole and undamaged; None if there is none."""
    return self._manager.latest_step()

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Tells orbax which of `checkpoints` (oldest first) to keep; this method makes the class a PreservationPolicy."""
    del context
    steps = [info.step for info in checkpoints]
    kept = set(steps[-self._keep :]) | self._keep_steps
    known = [step for step in steps if step in self._metric]
    if known:
      kept.add(min(known, key=self._metric.__getitem__))
    return [step in kept for step in steps]

  def require_space(self, step: int, state: Any):
    """Checks that a checkpoint fits on the disk. Orbax would find out while writing, and print hundreds of lines.

    Raises:
      UserError: it does not.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if needed > free:
      with writing(self._folder / str(step)):
        raise OSError(
          f"it needs {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left"
        )

  def save(
    self,
    step: int,
    state: Any,
    data: Any,
    metrics: Mapping,
    fingerprint: Mapping[str, str],
    changeable: Mapping[str, Mapping[str, Any]],
  ):
    """Copies the state and returns; the disk is written in the background.

    Args:
      step: number of steps done.
      state: pytree of arrays; may be donated as soon as this returns.
      data: position in the data, JSON-serialisable, the same in every process.
      metrics: numbers kept with the checkpoint; `best_metric` is among them at steps that were evaluated.
      fingerprint: settings that a run which resumes from here must match, see `stage_runs.StageRun`.
      changeable: settings that such a run may change, see `stage_runs.StageRun`.
    Raises:
      UserError: the previous checkpoint could not be written, or this one does not fit on the disk.
    """
    self.wait()  # orbax reports a failed write here, and `_saving` still names the step that failed
    self.require_space(step, state)
    self._note_metric(step, metrics)
    meta = {
      "step": step,
      "metrics": dict(metrics),
      "fingerprint": dict(fingerprint),
      "changeable": dict(changeable),
    }
    with writing(self._folder / str(step)):
      self._saving, self._began = step, time.time()
      self._sums.expect()
      saved = stacking.relay(state, stacking.stack_each)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(saved, save_args=_chunks(saved)),
          data=ocp.args.JsonSave({"position": data}),
          meta=ocp.args.JsonSave(meta),
        ),
      )

  def written(self) -> dict[str, float]:
    """What the last checkpoint took, once after it has reached the disk.

    Returns:
      checkpoint/seconds, from the call of `save` until it was whole, and checkpoint/bytes; {} while there is no news.
    """
    path = self._folder / str(self._saving)
    if self._began is None or not (path / manifest.NAME).is_file():
      return {}
    seconds, self._began = (path / manifest.NAME).stat().st_mtime - self._began, None
    return {
      "checkpoint/seconds": round(max(seconds, 0.0), 4),
      "checkpoint/bytes": manifest.size(path),
    }

  def wait(self):
    """Waits until the last checkpoint is on disk.

    Raises:
      UserError: it could not be written.
    """
    with writing(self._folder / str(self._saving)):
      self._manager.wait_until_finished()

  def restore(
    self,
    step: int,
    state: Any,
    fingerprint: Mapping[str, str],
    files: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
  ) -> tuple[Any, Any]:
    """Reads the state and the position in the data as they were saved at `step`, bit for bit.

    Args:
      step: step of a complete checkpoint.
      state: a freshly made state, whose structure, shapes and shardings the restored one gets. Its buffers are
        released first, so that a state which barely fits into memory can be resumed.
      fingerprint: this run's; it must equal the saved one.
      files: see `finished.require_same_run`.
    Returns:
      (state, position in the data).
    Raises:
      UserError: the fingerprints differ, or the files cannot be read.
    """
    directory = self._folder.parent
    # First of all: a run with other settings is refused before its state is released.
    saved_with = saved_state.read_meta(directory, step)["fingerprint"]
    finished.require_same_run(directory, saved_with, fingerprint, files)
    path = self._folder / str(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    saved = stacking.relay(abstract, stacking.stacked_shapes)
    for leaf in jax.tree.leaves(state):
      if isinstance(leaf, jax.Array):
        leaf.delete()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(saved), data=ocp.args.JsonRestore())

    def read_files():
      restored = self._manager.restore(step, args=args)
      return restored["state"], restored["data"]["position"]

    restored, position = reading.read(path, read_files, advice=saved_state.NOT_DAMAGED)
    return saved_state.laid_as(abstract, restored), position

  def _note_metric(self, step: int, metrics: Mapping):
    if self._best_metric in metrics:
      self._metric[step] = metrics[self._best_metric]


def _chunks(state: Any) -> Any:
  """How orbax cuts the arrays of a state into chunks. Layers are stacked."""

  def one(path, leaf) -> ocp.SaveArgs:
    if leaf.nbytes <= _CUT:
      return ocp.SaveArgs()
    of_layers = any(getattr(key, "key", None) == stacking.KEY for key in path)
    return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=(0,) if of_layers else ())

  return jax.tree_util.tree_map_with_path(one, state)
