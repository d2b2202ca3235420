"""Saving, finding and restoring training state, and the small files beside it.

Called by `loop` (save and resume), by the stages (weights of an earlier stage, `done.json`) and by
`main` (the lock of the workdir). A checkpoint holds the whole state, the position in the data and
what the run was made with; orbax writes it in the background and renames it into place when it is
complete. Knows nothing of models or stages.

On disk layers are always stacked on a leading axis, however the model runs them (stacking.py). Where they are scanned,
as on accelerators, the state is so already and is written as it lies. Where they are a list, on a CPU, the stack is
also the copy that a save needs anyway while the next step overwrites the state: orbax's own would take as much memory
(24 layers of 16 MiB: 393 MiB above the state either way, 0.5 s more for a save). The other form would cost an
accelerator a second state beside the one it trains, and 96 times as many arrays to write.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from instructjax.core.errors import UserError, writing
from instructjax.parallel import sharding, stacking
from instructjax.train import finished, reading

_FOLDER = "checkpoints"  # inside the directory of a stage
_PARTS = 64  # that a weight is gathered in to be hashed


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Never: `distributed` sees to SIGTERM, and asks JAX under numbers of its own. Orbax's would confuse the two."""
    del step
    return False


class Checkpoints:
  """The checkpoints of one stage. A context manager: leaving it waits for the disk.

  Keeps the `keep` newest, all of `keep_steps`, and the one with the lowest `best_metric`.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep: int,
    keep_steps: Iterable[int] = (),
    best_metric: str | None = None,
  ):
    self._folder = (pathlib.Path(directory) / _FOLDER).absolute()
    self._keep = keep
    self._keep_steps = frozenset(keep_steps)
    self._best_metric = best_metric
    self._metric = {}  # step -> value of best_metric
    self._saving = None  # step being written

  def __enter__(self) -> Self:
    with contextlib.ExitStack() as stack:
      stack.enter_context(reading.quiet_orbax(absl_logging.WARNING))
      with writing(self._folder):
        self._folder.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        _clear_half_written(self._folder)
      multihost_utils.sync_global_devices("half-written checkpoints cleared")
      options = ocp.CheckpointManagerOptions(preservation_policy=self, create=False)
      self._manager = stack.enter_context(_Manager(self._folder, options=options))
      for step in self._manager.all_steps():
        self._note_metric(step, read_meta(self._folder.parent, step)["metrics"])
      self._open = stack.pop_all()
    return self

  def __exit__(self, kind, error, traceback):
    with self._open:
      try:
        self.wait()
      except UserError:
        if error is None:  # an error under way says more than a save that failed in its wake
          raise

  def latest_step(self) -> int | None:
    """Newest complete checkpoint, None when there is none."""
    return self._manager.latest_step()

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """orbax's PreservationPolicy: which of `checkpoints`, oldest first, stay."""
    del context
    steps = [info.step for info in checkpoints]
    kept = set(steps[-self._keep :]) | self._keep_steps
    known = [step for step in steps if step in self._metric]
    if known:
      kept.add(min(known, key=self._metric.__getitem__))
    return [step in kept for step in steps]

  def save(
    self,
    step: int,
    state: Any,
    data: Any,
    metrics: Mapping,
    fingerprint: Mapping[str, str],
    changeable: Mapping[str, Mapping[str, Any]],
  ):
    """Copies the state to the host and returns; the disk is written in the background.

    Args:
      step: steps done.
      state: pytree of arrays; may be donated as soon as this returns.
      data: position in the data, JSON-serialisable, the same in every process.
      metrics: numbers kept with the checkpoint, `best_metric` among them where it is known.
      fingerprint: what a run that resumes from here must match, part -> hash.
      changeable: what it need not, as `loop.StageRun` has it.
    """
    self.wait()
    self._require_space(step, state)
    self._note_metric(step, metrics)
    meta = {
      "step": step,
      "metrics": dict(metrics),
      "fingerprint": dict(fingerprint),
      "changeable": dict(changeable),
    }
    with writing(self._folder / str(step)):
      self._saving = step
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(stacking.relay(state, stacking.stack_each)),
          data=ocp.args.JsonSave({"position": data}),
          meta=ocp.args.JsonSave(meta),
        ),
      )

  def wait(self):
    """Returns when what was saved is on disk; raises UserError when it could not be written."""
    with writing(self._folder / str(self._saving)):
      self._manager.wait_until_finished()

  def restore(self, step: int, state: Any, fingerprint: Mapping[str, str]) -> tuple[Any, Any]:
    """The state and the data position saved at `step`, bit for bit.

    Args:
      step: a complete checkpoint.
      state: freshly made state: its structure, shapes and shardings are what is restored. Its
        buffers are released first, so that a state that barely fits can be resumed.
      fingerprint: must equal what the checkpoint was saved with.
    Returns:
      (state, data).
    Raises:
      UserError: another fingerprint.
      UserError: the files cannot be read.
    """
    directory = self._folder.parent
    finished.require_same_run(directory, read_meta(directory, step)["fingerprint"], fingerprint)
    path = self._folder / str(step)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    saved = stacking.relay(abstract, stacking.stacked_shapes)
    for leaf in jax.tree.leaves(state):
      if isinstance(leaf, jax.Array):
        leaf.delete()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(saved), data=ocp.args.JsonRestore())
    restored = reading.read(path, lambda: self._manager.restore(step, args=args))
    data = restored["data"]
    # Older checkpoints hold the position once a process, each time the same.
    position = data["position"] if "position" in data else data["processes"][0]
    return _laid_as(abstract, restored["state"]), position

  def _note_metric(self, step: int, metrics: Mapping):
    if self._best_metric in metrics:
      self._metric[step] = metrics[self._best_metric]

  def _require_space(self, step: int, state: Any):
    """Finds a full disk beforehand: found while writing, orbax prints hundreds of lines."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if needed > free:
      with writing(self._folder / str(step)):
        raise OSError(
          f"it needs {needed / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left"
        )


def saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints of a stage, ascending."""
  folder = pathlib.Path(directory) / _FOLDER
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name) for path in folder.iterdir() if path.name.isdigit() and _is_complete(path)
  )


def read_meta(directory: pathlib.Path, step: int) -> dict:
  """{'step', 'metrics', 'fingerprint', 'changeable'} of a saved step."""
  path = pathlib.Path(directory) / _FOLDER / str(step)
  return reading.read(path, lambda: json.loads((path / "meta" / "metadata").read_text()))


def best_step(directory: pathlib.Path, metric: str) -> tuple[int, float]:
  """The step whose saved `metric` is lowest, the earliest of equals, and that value."""
  value = {
    step: read_meta(directory, step)["metrics"].get(metric) for step in saved_steps(directory)
  }
  known = [step for step in value if value[step] is not None]
  if not known:
    raise UserError(f"no checkpoint in {directory} was saved with the metric {metric!r}")
  best = min(known, key=value.__getitem__)
  return best, value[best]


def load_state_item(directory: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
  """Restores only the named part of a saved state: {'params': ...} out of a PPO state, say.

  Args:
    directory: directory of a stage (the one with `checkpoints/` in it).
    abstract: the state's structure cut down to what is wanted, of arrays or of ShapeDtypeStruct
      (with a sharding). Fields of a dataclass are named as keys of a dict. Another dtype converts.
    step: None for the newest.
  Returns:
    A tree like `abstract`.
  Raises:
    UserError: no such checkpoint, unreadable, or not of these names and shapes.
  """
  steps = saved_steps(directory)
  if not steps or (step is not None and step not in steps):
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{wanted} in {directory} (complete ones: {steps or 'none'})")
  path = pathlib.Path(directory).absolute() / _FOLDER / str(steps[-1] if step is None else step)
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract)
  saved = _saved_shapes(path)
  abstract = stacking.relay(wanted, stacking.stacked_shapes)
  # A partial restore would pass over both mistakes in silence.
  for name, shape in _shapes(abstract).items():
    if saved.get(name) != shape:
      found = f"has shape {saved[name]}" if name in saved else "is missing"
      raise UserError(f"{path} does not fit this model: {name} must have shape {shape} and {found}")
  args = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  with _checkpointer() as checkpointer:
    restored = reading.read(path, lambda: checkpointer.restore(path / "state", args=args))
  return _laid_as(wanted, restored)


def load_params(
  directory: pathlib.Path, abstract_params: Any, step: int | None = None, name: str = "params"
) -> Any:
  """Restores one field of a saved state: `params`, `ema_params`, `value_params`."""
  return load_state_item(directory, {name: abstract_params}, step)[name]


def tree_fingerprint(tree: Any) -> str:
  """sha256 of names, shapes, dtypes and bytes of a pytree, the same however it is sharded."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = leaf.dtype if isinstance(leaf, jax.Array) else np.asarray(leaf).dtype
    digest.update(f"{jax.tree_util.keystr(path)} {dtype} {np.shape(leaf)}\n".encode())
    for part in _host_parts(leaf):
      digest.update(np.ascontiguousarray(part).tobytes())
  return digest.hexdigest()


def _host_parts(leaf: Any) -> Iterator[np.ndarray]:
  """A leaf on the host, in parts of its first dimension where processes share it: gathered whole, a large model's
  stacked layers would have to fit into each device.
  """
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.ndim < 2:
    yield sharding.to_host(leaf)
    return
  size = len(leaf)
  edges = np.linspace(0, size, min(size, _PARTS) + 1).astype(int)
  for start, stop in zip(edges, edges[1:]):
    yield sharding.to_host(leaf[start:stop])


def _is_complete(path: pathlib.Path) -> bool:
  return all(
    (path / part).is_file() for part in ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata")
  )


def _clear_half_written(folder: pathlib.Path):
  for path in folder.iterdir():
    if ".orbax-checkpoint-tmp" in path.name:
      shutil.rmtree(path, ignore_errors=True)
    elif path.name.isdigit() and not _is_complete(
      path
    ):  # a copy that broke off, say: not ours to delete
      path.rename(path.with_name(f"{path.name}.incomplete"))


@contextlib.contextmanager
def _checkpointer() -> Generator[ocp.Checkpointer, None, None]:
  with (
    reading.quiet_orbax(absl_logging.WARNING),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
  ):
    yield checkpointer


def _saved_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Name -> shape of what a checkpoint's folder holds."""
  with _checkpointer() as checkpointer:

    def tree() -> Any:
      metadata = checkpointer.metadata(path / "state").item_metadata
      if metadata is None:
        raise ValueError("it does not say what it holds")
      return metadata.tree

    return _shapes(reading.read(path, tree))


def _laid_as(wanted: Any, restored: Any) -> Any:
  """The restored tree with layers as `wanted` has them: as they are on disk, or a list."""
  if jax.tree.structure(restored) == jax.tree.structure(wanted):
    return restored
  return stacking.relay(restored, stacking.unstack_each)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }
