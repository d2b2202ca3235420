"""Weights by path: a finished stage of a run, a Hugging Face folder, a GGUF file, or `hf://ORG/NAME`.

Called by context.py (bases that the config gives), policies.py, generate.py and export.py. Imports no
stage.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
from jax.sharding import Mesh

from instructjax.core.config import NetworkConfig, network_config
from instructjax.core.errors import UserError
from instructjax.core.stages import ROLES, STAGES, Head, Stage, selector
from instructjax.core.structs import Params
from instructjax.data import tokenizer as tokenizers
from instructjax.models import execution, heads, interop, transformer
from instructjax.train import checkpoint, finished

HUB = "hf://"

Which = Literal["ema", "raw", "value"]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights that can be loaded; only headers and small files have been read so far.

  Attributes:
    path: the stage's folder, the Hugging Face folder or the GGUF file.
    kind: which of them.
    network: its architecture.
    head: 'lm', or 'scalar' for a reward or value model.
    vocab_size: rows of the embedding table in the files.
    fingerprint: equal for equal weights, cheap to compute: nothing of their size is read.
    tokenizer_path: what `tokenizers.load` takes.
    step: of a stage's checkpoint.
    item: name of the weights inside the checkpoint.
    done: what the stage left; None for other kinds.
    base: what `model.weights` named in the run that trained them; '' where its base was trained too.
  """

  path: pathlib.Path
  kind: Literal["stage", "hf", "gguf"]
  network: NetworkConfig
  head: Head
  vocab_size: int
  fingerprint: str
  tokenizer_path: pathlib.Path
  step: int | None
  item: str
  done: finished.Done | None
  base: str

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer that lies beside the weights, or inside their file."""
    return tokenizers.load(self.tokenizer_path)

  @property
  def settings(self) -> Mapping[str, str]:
    """What a stage was made with, name -> JSON or hash; {} for other kinds."""
    return self.done.fingerprint if self.done else {}

  @property
  def stage(self) -> Stage | None:
    """The stage that trained them, whatever its folder is called now; None for other kinds."""
    return STAGES[self.done.stage] if self.done else None

  def require_done(self) -> finished.Done:
    """`done`, for whoever knows that these are a stage's weights."""
    if self.done is None:
      raise ValueError(f"{self.path} is not a stage of a run")
    return self.done

  def require_stage(self) -> Stage:
    """`stage`, for whoever knows that these are a stage's weights."""
    return STAGES[self.require_done().stage]

  def require_step(self) -> int:
    """`step`, for whoever knows that these are a stage's weights."""
    if self.step is None:
      raise ValueError(f"{self.path} is not a stage of a run, and has no steps")
    return self.step

  def model(self, mesh: Mesh) -> transformer.Model:
    """The network for inference on a mesh; its vocabulary is the tokenizer's, so no id without text is sampled."""
    chosen = execution.for_inference(execution.platform_of(mesh))
    return execution.model_on(mesh, self.network, chosen, self.tokenizer.vocab_size, self.head)

  def load(self, mesh: Mesh, model: transformer.Model) -> Params:
    """The weights, float32, placed on the mesh; a reward model's with its bias (C.2).

    Args:
      mesh: where to.
      model: of this architecture.
    Raises:
      UserError: the files do not hold this model's parameters.
      UserError: they cannot be read.
    """
    if self.kind != "stage":
      shardings, _ = transformer.param_shardings(mesh, model)
      return interop.load_params(interop.open_weights(self.path), model, shardings)
    done = self.require_done()
    params = load_stage(self.path, mesh, model, self.require_step(), self.item)
    if STAGES[done.stage].role != "reward":
      return params
    return heads.shift_bias(params, done.result.demonstration_mean)


def load_stage(
  directory: pathlib.Path, mesh: Mesh, model: transformer.Model, step: int, item: str
) -> Params:
  """Weights `item` of a stage's checkpoint, placed on the mesh.

  Raises:
    UserError: there are none of this model, or they cannot be read.
  """
  shardings, shapes = transformer.param_shardings(mesh, model)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return checkpoint.load_params(directory, placed, step, item)


def locate(path: str | pathlib.Path, which: Which = "ema") -> Weights:
  """Finds out what lies at a path.

  Args:
    path: folder of a finished stage (runs/demo/ppo_ptx), a Hugging Face folder, a .gguf file, or
      hf://ORG/NAME[@REVISION], which is fetched into the hub's own cache.
    which: of an RL stage, the averaged policy, the last one, or the value network.
  Raises:
    UserError: nothing that can be opened lies there, or a stage has no such weights.
  """
  if str(path).startswith(HUB):
    path = interop.download(str(path).removeprefix(HUB))
  path = pathlib.Path(path).absolute()
  if (path / "done.json").is_file() or (path / "checkpoints").is_dir():
    return _open_stage(path, which)
  if path.is_dir() and not (path / "config.json").is_file():
    raise UserError(
      f"{path} must be the folder of a finished stage, as runs/demo/ppo_ptx, or a Hugging Face folder, and"
      " it has neither done.json nor config.json"
    )
  if which == "value":
    raise UserError(f"{path} must be a finished RL stage to have a value network")
  source = interop.open_weights(path)
  found = interop.describe(source)
  return Weights(
    path=path,
    kind="gguf" if path.suffix == ".gguf" else "hf",
    network=found.cfg,
    head=found.head,
    vocab_size=found.vocab_size,
    fingerprint=source.fingerprint,
    tokenizer_path=path,
    step=None,
    item="params",
    done=None,
    base="",
  )


def _open_stage(path: pathlib.Path, which: Which) -> Weights:
  done = finished.read_done(path)
  stage = STAGES.get(done.stage) if done else None
  if done is None or stage is None or stage.role is None:
    raise UserError(
      f"{path} must be the folder of a finished stage that trains a network, as runs/demo/ppo_ptx"
    )
  if which == "value" and not stage.is_rl:
    raise UserError(f"{path} must be an RL stage to have a value network")
  made_with = done.fingerprint
  # A stage calls its own network `model`, whatever its role; the value network is the reward model's.
  block = "reward_model" if which == "value" else "model"
  network = network_config(json.loads(made_with[f"config.{block}"]), f"{path}/done.json")
  # The SFT baseline is the epoch that the reward model chose, once it has (C.1).
  again = selector(stage.name)
  chosen = finished.read_done(path.parent / again) if again else None
  step = (chosen or done).require_step()
  has_average = stage.is_rl and json.loads(made_with[f"config.{stage.block}"])["ema_decay"] > 0
  averaged = "ema_params" if has_average else "params"
  item = {"ema": averaged, "raw": "params", "value": "value_params"}[which]
  tokenizer_path = path.parent / "tokenizer"
  tokenizer = tokenizers.load(tokenizer_path)
  if tokenizer.fingerprint != made_with["tokenizer"]:
    raise UserError(f"{tokenizer_path} is not the tokenizer that {path} was trained with")
  identity = json.dumps([made_with, step, item], sort_keys=True)
  return Weights(
    path=path,
    kind="stage",
    network=network,
    head="scalar" if which == "value" else ROLES[stage.role].head,
    vocab_size=tokenizer.vocab_size,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    tokenizer_path=tokenizer_path,
    step=step,
    item=item,
    done=done,
    base=checkpoint.read_meta(path, step)["changeable"]["same numbers"][f"{block}.weights"],
  )
