"""Opens weights by their path: a stage of a run, a Hugging Face folder, a GGUF file, or a name for where these lie.

Called by stages/ (for weights that the config gives, and weights of earlier stages) and by serve/. Imports no stage.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax.core.blocks import SAME_NUMBERS
from instructjax.core.config import NetworkConfig, network_config
from instructjax.core.errors import UserError
from instructjax.core.stages import ROLES, STAGES, Head, Stage, selector
from instructjax.core.structs import Params
from instructjax.data import tokenizer as tokenizers
from instructjax.data.checksums import FileChecksums
from instructjax.models import adapters, execution, heads, interop, transformer
from instructjax.parallel import sharding
from instructjax.train import adapter_base, finished, saved_state, weight_places
from instructjax.train.adapter_base import BASE, VALUE_BASE, Adapter

Which = Literal["ema", "raw", "value"]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights that are found but not loaded: only headers and small files have been read.

  Attributes:
    path: the stage's folder, the Hugging Face folder or the GGUF file.
    kind: which of these three it is.
    network: the architecture.
    head: 'lm', or 'scalar' for a reward or value model.
    vocab_size: rows of the embedding table in the files.
    fingerprint: for a stage, a hash of everything that it was made with, of the step and of the item; '' for other
      kinds, which only their files tell apart.
    files: the files with the weights of other kinds, config.json included; () for a stage.
    tokenizer_path: argument for `tokenizers.load`.
    step: step of a stage's checkpoint; None for other kinds.
    item: name of the weights inside the checkpoint.
    done: the stage's done.json; None for other kinds.
    score_skips: of a Hugging Face classifier, its pad token, at which no score is read; None for other kinds and for
      one without a pad token.
    base: the path of the given weights that these descend from, in the run that trained them; '' if that run trained
      its own base, and for other kinds.
    adapter: of a stage that trained an adapter, its settings and its base; None for whole weights. A folder of peft is
      opened as whole weights.
  """

  path: pathlib.Path
  kind: Literal["stage", "hf", "gguf"]
  network: NetworkConfig
  head: Head
  vocab_size: int
  fingerprint: str
  files: tuple[pathlib.Path, ...]
  tokenizer_path: pathlib.Path
  step: int | None
  item: str
  done: finished.Done | None
  base: str
  score_skips: int | None = None
  adapter: Adapter | None = None

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer beside the weights, or inside their file.

    Raises:
      UserError: it cannot be read.
    """
    return tokenizers.load(self.tokenizer_path)

  @property
  def settings(self) -> Mapping[str, str]:
    """The stage's fingerprint (everything that it was made with), name -> JSON or hash; {} for other kinds."""
    return self.done.fingerprint if self.done else {}

  @property
  def stage(self) -> Stage | None:
    """The stage that trained these weights, by its done.json, since the folder may be renamed; None for other kinds."""
    return STAGES[self.done.stage] if self.done else None

  @property
  def end_of_score(self) -> str:
    """Where a reward model's score is read, in words."""
    if self.score_skips in self.tokenizer.stop_ids:
      pad = f"its pad token too (id {self.score_skips})"
      return f"its score is read before the EOS, which is {pad}, as transformers does"
    return "its score is read at the token that ends an answer, the EOS"

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
    """The network for inference on a mesh.

    Its vocabulary is the tokenizer's. Files may have more rows of embeddings, and no id without a text must be sampled.

    Raises:
      UserError: the tokenizer has more ids than the files have rows.
    """
    self.require_rows()
    chosen = execution.for_inference(sharding.platform_of(mesh))
    return execution.model_on(mesh, self.network, chosen, self.tokenizer.vocab_size, self.head)

  def require_rows(self):
    """Refuses a tokenizer with ids past the embedding table: those of tokens that nothing was trained with.

    Raises:
      UserError: it has some.
    """
    # An exported reward or value model has a row for the pad token, which `vocab_size` does not count.
    num_rows, num_ids = self.vocab_size + (self.head == "scalar"), self.tokenizer.vocab_size
    if num_ids > num_rows:
      raise UserError(
        f"{self.tokenizer.path} has ids up to {num_ids - 1}, and the embedding table of {self.path} has"
        f" {self.vocab_size} rows; give the tokenizer and the added tokens that belong to the weights"
      )

  def load(self, mesh: Mesh, model: transformer.Model) -> Params:
    """Loads the weights in float32 onto the mesh; those of a reward model include its bias (C.2).

    Args:
      mesh: devices to place the weights on.
      model: a network of this architecture.
    Raises:
      UserError: the files cannot be read, or do not hold this model's parameters.
    """
    if self.kind != "stage":
      shardings, _ = transformer.param_shardings(mesh, model)
      return interop.load_params(interop.open_weights(self.path), model, shardings)
    adapted, params = self.load_trained(mesh, model)
    if self.adapter is None:
      return params
    base = self.require_base()
    whole = base.load(mesh, model.clone(head=base.head))
    return adapters.merge(adapted, adapters.base_of(adapted, whole), params)

  def load_trained(self, mesh: Mesh, model: transformer.Model) -> tuple[transformer.Model, Params]:
    """Loads what a stage trained: (the model, with its adapter if there is one; all weights, or the adapter's).

    Args, raises: as for `load`.
    """
    model = model.clone(adapter=self.adapter.cfg) if self.adapter else model
    params = load_stage(self.path, mesh, model, self.require_step(), self.item)
    return model, heads.shift_bias(params, self.shift) if self.shift else params

  @property
  def shift(self) -> float:
    """What the bias in a reward model's checkpoint is to be lowered by; 0 for other weights."""
    # A checkpoint of `rm` is saved before the bias is known: the mean that it takes away is in done.json.
    done = self.done
    return done.result.shift if done and STAGES[done.stage].kind == "rm" else 0.0

  @property
  def is_adapter(self) -> bool:
    """Whether these are an adapter: of a stage, or a folder of peft, which is opened as whole weights."""
    return self.adapter is not None or (self.kind == "hf" and interop.is_adapter(self.path))

  def misfit(self, model: transformer.Model) -> str:
    """Of an adapter: why it cannot be trained on as the model's, in words; '' if it can.

    Raises:
      UserError: a folder of peft cannot be read.
    """
    if self.adapter is None:
      return interop.misfit(self.path, model)
    theirs, ours = self.adapter.cfg, model.require_adapter()
    if theirs.rank != ours.rank:
      return f"its rank is {theirs.rank}, and config.adapter.rank={ours.rank}"
    if {*theirs.targets} != {*ours.targets}:
      return f"it adapts {', '.join(theirs.targets)}, and config.adapter.targets={ours.targets}"
    return ""

  def load_adapter(self, mesh: Mesh, model: transformer.Model) -> Params:
    """Loads an adapter that `misfit` lets pass, to be trained on as the model's; with its head if that is scalar.

    B is scaled so that the product stays what it was under the model's own alpha / rank.

    Args, raises: as for `load`.
    """
    shardings, shapes = adapters.trained_shardings(mesh, model)
    if self.adapter is None:
      read = interop.read_adapter(self.path, model)
      return jax.device_put(read, shardings)
    _, trained = self.load_trained(mesh, model)
    ours = model.require_adapter()
    scale = self.adapter.cfg.alpha / self.adapter.cfg.rank / (ours.alpha / ours.rank)

    def scaled(path, leaf):
      return leaf * jnp.float32(scale) if path[-1].key.startswith("w_b_") else leaf

    of_layers = jax.tree_util.tree_map_with_path(scaled, trained["layers"])
    return {name: of_layers if name == "layers" else trained[name] for name in shapes}

  def checksum(self, memory: pathlib.Path) -> str:
    """What these weights are recognised by; hashes files that are not in `memory`, see `FileChecksums`.

    Raises:
      UserError: a file cannot be read.
    """
    if self.kind == "stage":
      return self.fingerprint
    try:
      return FileChecksums(memory, lambda: None).content(self.kind, self.files).fingerprint
    except OSError as error:
      raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

  def require_base(self) -> "Weights":
    """Opens the base of an adapter.

    Raises:
      UserError: it cannot be opened, or is another one than the adapter was trained on.
    """
    if self.adapter is None:
      return locate(interop.base_of(self.path))
    base, record = locate(self.adapter.base), self.adapter.record
    if record.inside and base.is_adapter and not self.adapter.is_named:
      base = base.require_base()
    # Neither plays a part: nothing is initialised, and files of rotary networks may say a longer context.
    theirs, ours = (
      dataclasses.replace(cfg, init_std=0.0, max_length=0) for cfg in (base.network, self.network)
    )
    if theirs != ours or base.head not in ("lm", self.head):
      raise UserError(
        f"{self.path} is an adapter of another base than {base.path}: their networks differ"
      )
    # A base that somebody names may be a copy in another format, which cannot be compared.
    if record.kind == "own" and base.done is not None:
      is_other = base.done.identity != record.checksum
    else:
      memory = self.path.parent / "cache" / "checksums.json"  # of the run that the adapter is from
      is_other = base.kind == record.kind and base.checksum(memory) != record.checksum
    if is_other:
      raise UserError(
        f"{self.path} is an adapter of another base than {base.path}, which was trained or written anew since; give"
        " the one that it was trained on with --base"
      )
    return base


def differences(theirs: NetworkConfig, ours: NetworkConfig) -> tuple[dict, dict]:
  """Where the network of opened files cannot stand for the one that a run asks for: field -> value, of both.

  Args:
    theirs: the network of the files.
    ours: the network that is asked for.
  """
  has, asked = dataclasses.asdict(theirs), dataclasses.asdict(ours)
  has["init_std"] = asked["init_std"]  # plays no part, since nothing is initialised
  if ours.position == "rope" and ours.max_length <= theirs.max_length:
    # Rotary positions have no table, so a shorter context fits too.
    has["max_length"] = ours.max_length
  wrong = [name for name in asked if has[name] != asked[name]]
  return {name: has[name] for name in wrong}, {name: asked[name] for name in wrong}


def load_stage(
  directory: pathlib.Path, mesh: Mesh, model: transformer.Model, step: int, item: str
) -> Params:
  """Loads the weights called `item` from a stage's checkpoint onto the mesh: what was trained of the model.

  Raises:
    UserError: the checkpoint has no such weights for this model, or cannot be read.
  """
  shardings, shapes = adapters.trained_shardings(mesh, model)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return saved_state.load_params(directory, placed, step, item)


def locate(path: str | pathlib.Path, which: Which = "ema", base: str = "") -> Weights:
  """Finds the weights at a path without loading them.

  Args:
    path: folder of a finished stage (runs/demo/ppo_ptx), a Hugging Face folder, a .gguf file, or
      hf://ORG/NAME[@REVISION], which is fetched into the hub's own cache; or package:PACKAGE/FILE, a file that an
      installed Python package holds.
    which: of an RL stage, the policy averaged over iterations ('ema'), the last policy ('raw'), or the value network.
      Other stages ignore the first two.
    base: of an adapter, where its base lies now; '' for the place that it names itself.
  Raises:
    UserError: nothing that can be opened lies there, a file is damaged, or the stage has no such weights.
  """
  path = weight_places.on_disk(path)
  kind = weight_places.kind(path)
  if kind == "stage":
    return _open_stage(path, which, base)
  if kind == "neither":
    raise UserError(
      f"{path} must be the folder of a finished stage, as runs/demo/ppo_ptx, or a Hugging Face folder, and"
      f" it has neither done.json nor config.json{interop.found_instead(path)}"
    )
  if which == "value":
    raise UserError(f"{path} must be a finished RL stage to have a value network")
  source = interop.open_weights(path, weight_places.on_disk(base) if base else None)
  found = interop.describe(source)
  return Weights(
    path=path,
    kind="hf" if path.is_dir() else "gguf",
    network=found.cfg,
    head=found.head,
    vocab_size=found.vocab_size,
    fingerprint="",
    files=source.files,
    tokenizer_path=weight_places.tokenizer_place(path, base),
    step=None,
    item="params",
    done=None,
    base="",
    score_skips=interop.pad_id(source) if found.head == "scalar" else None,
  )


def _open_stage(path: pathlib.Path, which: Which, base: str) -> Weights:
  done = finished.read_done(path)
  stage = STAGES.get(done.stage) if done else None
  if done is None or stage is None or stage.role is None:
    raise UserError(
      f"{path} must be the folder of a finished stage that trains a network, as runs/demo/ppo_ptx"
    )
  if which == "value" and not stage.is_rl:
    raise UserError(f"{path} must be an RL stage to have a value network")
  if done.step is None:
    raise UserError(
      f"{path} measured a reward model that was given, and holds none: give the path of those weights"
    )
  made_with = done.fingerprint
  if which == "value" and json.loads(made_with[f"config.{stage.block}"])["advantage"] != "gae":
    raise UserError(f"{path} was trained without a value network (ppo.advantage is not 'gae')")
  # In its fingerprint a stage calls its own network `model`, whatever its role. The value network of an RL stage has
  # the reward model's architecture, since it starts as the reward model.
  block = "reward_model" if which == "value" else "model"
  network = network_config(json.loads(made_with[f"config.{block}"]), f"{path}/done.json")
  # The SFT baseline is the epoch that the reward model prefers (C.1), once `sft_select` has chosen it.
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
  changeable = saved_state.read_meta(path, step)["changeable"]
  head: Head = "scalar" if which == "value" else ROLES[stage.require_role()].head
  given = changeable[SAME_NUMBERS["on_resume"]][f"{block}.weights"]
  key = VALUE_BASE if which == "value" else BASE
  adapter = adapter_base.of_stage(path, made_with, key, base, given)
  if base and adapter is None:
    raise UserError(f"{path} is no adapter, and needs no base; leave out {base}")
  return Weights(
    path=path,
    kind="stage",
    network=network,
    head=head,
    vocab_size=tokenizer.vocab_size,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    files=(),
    tokenizer_path=tokenizer_path,
    step=step,
    item=item,
    done=done,
    base=given,
    adapter=adapter,
  )
