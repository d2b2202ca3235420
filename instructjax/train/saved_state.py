"""Reads checkpoints, or parts of them, without going on from them: the weights of a finished stage, the best step.

Called by `weights`, `streams` and stages. Each file that is read is compared with the manifest first.
"""

import contextlib
import json
import pathlib
from collections.abc import Generator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from instructjax.core.errors import UserError
from instructjax.parallel import stacking
from instructjax.train import damaged, manifest, reading
from instructjax.train.damaged import saved_steps

# Where the manifest finds nothing wrong and orbax still cannot read.
NOT_DAMAGED = (
  "Its files are as they were saved, so it was saved by other versions of the libraries or by another version of"
  " instructjax: use those, or another --workdir."
)


def read_meta(directory: pathlib.Path, step: int) -> dict:
  """Reads what was saved beside the state of a step: {'step', 'metrics', 'fingerprint', 'changeable'}.

  Raises:
    UserError: the file is damaged or missing.
  """
  path = pathlib.Path(directory) / damaged.FOLDER / str(step)
  damage = manifest.find_fault(path, damaged.META)
  if damage:
    raise UserError(f"{damage}. {damaged.advice(directory, step)}")
  return json.loads((path / damaged.META).read_text(encoding="utf-8"))


def best_step(directory: pathlib.Path, metric: str) -> tuple[int, float]:
  """The saved step with the lowest `metric` (the earliest of equal ones), and its value.

  Raises:
    UserError: no checkpoint was saved with this metric, or one cannot be read.
  """
  value = {
    step: read_meta(directory, step)["metrics"].get(metric) for step in saved_steps(directory)
  }
  known = [step for step in value if value[step] is not None]
  if not known:
    raise UserError(f"no checkpoint in {directory} was saved with the metric {metric!r}")
  best = min(known, key=value.__getitem__)
  return best, value[best]


def load_state_item(directory: pathlib.Path, abstract: Any, step: int | None = None) -> Any:
  """Restores a part of a saved state, for example only {'params': ...} of a PPO state.

  Args:
    directory: folder of a stage (the one with `checkpoints/` in it).
    abstract: the state's structure, cut down to the part that is wanted, with arrays or ShapeDtypeStructs (with a
      sharding) as leaves. A dict stands for a dataclass, its keys for the fields. Arrays are converted to the dtypes
      given here.
    step: None for the newest checkpoint.
  Returns:
    A tree like `abstract`.
  Raises:
    UserError: there is no such checkpoint, it cannot be read, or it holds other names or shapes.
  """
  steps = saved_steps(directory)
  if step is None and not steps:
    raise UserError(f"no checkpoint in {directory}")
  step = steps[-1] if step is None else step
  path = require_whole(directory, step)
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract)
  require_shapes(path, wanted)
  abstract = stacking.relay(wanted, stacking.stacked_shapes)
  args = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  with _checkpointer() as checkpointer:
    restored = reading.read(
      path, lambda: checkpointer.restore(path / "state", args=args), advice=NOT_DAMAGED
    )
  return laid_as(wanted, restored)


def require_whole(directory: pathlib.Path, step: int) -> pathlib.Path:
  """The folder of a checkpoint, all of whose bytes are as they were saved. All processes must call it.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  path = pathlib.Path(directory).absolute() / damaged.FOLDER / str(step)
  damage = manifest.find_damage(path)
  if damage:
    missing = "" if path.is_dir() else f"no checkpoint of step {step} in {directory}: "
    raise UserError(f"{missing}{damage}. {damaged.advice(directory, step)}")
  return path


def require_shapes(path: pathlib.Path, abstract: Any):
  """Compares a part of a state with what a checkpoint holds.

  Args:
    path: folder of the checkpoint.
    abstract: as for `load_state_item`, the layers in either form.
  Raises:
    UserError: the checkpoint holds other names or shapes, or cannot be read.
  """
  # Orbax's partial restore reports neither a missing name nor a wrong shape.
  saved = _saved_shapes(path)
  for name, shape in _shapes(stacking.relay(abstract, stacking.stacked_shapes)).items():
    if saved.get(name) != shape:
      found = f"has shape {saved[name]}" if name in saved else "is missing"
      raise UserError(f"{path} does not fit this model: {name} must have shape {shape} and {found}")


def load_params(
  directory: pathlib.Path, abstract_params: Any, step: int | None = None, name: str = "params"
) -> Any:
  """Restores one field of a saved state: `params`, `ema_params` or `value_params`.

  Raises:
    UserError: see `load_state_item`.
  """
  return load_state_item(directory, {name: abstract_params}, step)[name]


def laid_as(wanted: Any, restored: Any) -> Any:
  """The restored tree with its layers laid out as in `wanted`: stacked, as on disk, or as a list."""
  if jax.tree.structure(restored) == jax.tree.structure(wanted):
    return restored
  return stacking.relay(restored, stacking.unstack_each)


@contextlib.contextmanager
def _checkpointer() -> Generator[ocp.Checkpointer, None, None]:
  with (
    reading.quiet_orbax(absl_logging.WARNING),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
  ):
    yield checkpointer


def _saved_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Name -> shape of each array in a checkpoint's folder."""
  with _checkpointer() as checkpointer:

    def tree() -> Any:
      metadata = checkpointer.metadata(path / "state").item_metadata
      if metadata is None:
        raise ValueError("it does not say what it holds")
      return metadata.tree

    return _shapes(reading.read(path, tree, advice=NOT_DAMAGED))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }
