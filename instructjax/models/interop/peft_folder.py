"""Reads and writes adapter folders of `peft`: adapter_config.json and adapter_model.safetensors.

A folder is read as the weights of its base with the adapter merged into them, so whatever takes weights takes it. The
base is what adapter_config.json names, or what the caller gives. Called by the package's own `__init__`.

What peft does with a matrix W of [out, in] (GPT-2's are [in, out]): W + scale * B A, with lora_A of [rank, in], lora_B
of [out, rank], and scale = lora_alpha / rank, or lora_alpha / sqrt(rank) with use_rslora.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from instructjax.core import foreign
from instructjax.core.errors import UserError, writing
from instructjax.core.foreign import Keys, named
from instructjax.core.structs import Params
from instructjax.models.interop import huggingface, peft_factors, tensor_table
from instructjax.models.interop.hf_config import CLASSIFIERS, SCORE_BIAS
from instructjax.models.interop.source import Source
from instructjax.models.transformer import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_SCORE = "score.weight"
# Initialisations that change the base as well, so that the adapter does not belong to the base that is named.
_MOVED = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Kinds of LoRA that compute something else with tensors of the same names: on some tokens only, on copied layers, ...
_OTHERS = (
  *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "kasa_config", "arrow_config"),
  *("alora_invocation_tokens", "layer_replication"),
)


def is_adapter(path: pathlib.Path) -> bool:
  """Whether a folder is peft's. One that holds merged weights too is, as for transformers."""
  return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def base_of(path: pathlib.Path) -> pathlib.Path:
  """Where an adapter's base lies: the folder or file that its config names, or what the hub has under the name.

  Raises:
    UserError: the config cannot be read or names none, or nothing is found under the name.
  """
  keys = Keys(foreign.read_json(path / CONFIG), str(path / CONFIG))
  name = keys.text("base_model_name_or_path", "")
  if not name:
    raise UserError(f"{path} is an adapter, and its {CONFIG} names no base; give one with --base")
  try:
    for place in (path / name, pathlib.Path(name)):
      if place.exists():
        return place.absolute()
  except (OSError, ValueError):  # no path of this machine
    pass
  if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII):
    raise UserError(
      f"{path} is an adapter of {named(name)}, which is not there; give its base with --base, or as"
      f" base_model_name_or_path in {CONFIG}"
    )
  revision = keys.text("revision", "")
  return huggingface.download(name + (f"@{revision}" if revision else ""))


def open_adapter(path: pathlib.Path, base: Source) -> Source:
  """An adapter merged into its base, tensor by tensor as they are read.

  Args:
    path: the folder.
    base: the opened base.
  Raises:
    UserError: the adapter is of a kind that is not read, or of another base or rank.
  """
  keys = Keys(foreign.read_json(path / CONFIG), str(path / CONFIG))
  _require_plain(keys)
  file = path / WEIGHTS
  found = huggingface.read_shapes(file)
  theirs = {name: name.removeprefix(_PREFIX) for name in found}
  factors: dict[str, dict[str, str]] = {}  # tensor of the base -> A or B -> tensor of the adapter
  for name, plain in theirs.items():
    match = _FACTOR.fullmatch(plain)
    if match:
      factors.setdefault(_in_base(path, base, match[1], name), {})[match[2]] = name
    elif plain != _SCORE:
      raise UserError(
        f"{file} has tensor {named(name)}, and only LoRA factors and a score are read"
      )
  if not factors:
    raise UserError(f"{file} has no LoRA factors")
  flips = Keys(base.config, str(base.path)).text("model_type", "") == "gpt2"
  for tensor, pair in factors.items():
    _require_pair(keys, file, base, tensor, {x: found[name] for x, name in pair.items()}, flips)
  places = {name: (file, shape) for name, shape in found.items()}
  config, shapes = dict(base.config), dict(base.shapes)
  if score := next((name for name, plain in theirs.items() if plain == _SCORE), None):
    config |= _classifier(config, keys)
    shapes = {name: shape for name, shape in shapes.items() if name not in tensor_table.LM_HEADS}
    shapes[_SCORE] = found[score]
  alpha, is_root = keys.number("lora_alpha", 8.0), keys.flag("use_rslora", False)
  read_ours = functools.partial(huggingface.read_tensor, places)

  def read_rows(name: str, start: int, stop: int) -> np.ndarray:
    if name == _SCORE and score:
      return read_ours(score)[start:stop]
    weight, pair = base.read_rows(name, start, stop), factors.get(name)
    if pair is None:
      return weight
    a, b = read_ours(pair["A"]), read_ours(pair["B"])
    product = b @ a * np.float32(alpha / (len(a) ** 0.5 if is_root else len(a)))
    # The whole product, so that a row has the same bits whichever others are asked for.
    return weight + (product.T if flips else product)[start:stop]

  return Source(
    path=path,
    config=config,
    shapes=shapes,
    read_rows=read_rows,
    files=(path / CONFIG, file, *base.files),
    notes=(*base.notes, f"an adapter, read with its base {base.path}"),
  )


def _require_plain(keys: Keys):
  """Refuses adapters that compute something else than W + scale * B A."""
  keys.one_of("peft_type", ("LORA",))
  for name in _OTHERS:
    keys.refuse(name, False)
  keys.refuse("bias", "none")
  keys.refuse("alpha_pattern", {})
  keys.refuse("fan_in_fan_out", False, True)
  start = keys.value("init_lora_weights", True)
  if isinstance(start, str) and start.lower().startswith(_MOVED):
    raise keys.wrong("init_lora_weights", "must not be one that changes the base as well")


def _in_base(path: pathlib.Path, base: Source, module: str, name: str) -> str:
  """The base's tensor that a factor belongs to; files of bare trunks have names without the first part."""
  wanted = f"{module}.weight"
  for tensor in (wanted, wanted.partition(".")[2]):
    if tensor in base.shapes:
      return tensor
  raise UserError(
    f"{path} is an adapter of another base than {base.path}: it has {named(name)}, and there is no such matrix"
  )


def _require_pair(
  keys: Keys, file: pathlib.Path, base: Source, tensor: str, pair: dict, flips: bool
):
  """Compares the factors of a matrix with each other, with the config's rank, and with the base."""
  if pair.keys() != {"A", "B"}:
    raise UserError(f"{file} has only one of lora_A and lora_B for {named(tensor)}")
  shape = base.shapes[tensor]
  wanted = shape[::-1] if flips else shape
  if len(shape) != 2 or (pair["B"][0], pair["A"][-1]) != wanted:
    raise UserError(
      f"{file} is an adapter of another base than {base.path}: for {named(tensor)} it has"
      f" {pair['B'][0]} x {pair['A'][-1]}, and the base has {' x '.join(map(str, wanted))}"
    )
  rank, patterns = keys.size("r", 8), keys.value("rank_pattern", {})
  ranks = {pair["A"][0], pair["B"][-1]}
  if len(ranks) != 1 or (not patterns and ranks != {rank}):
    raise UserError(
      f"{file}: the factors of {named(tensor)} have rank {' and '.join(map(str, sorted(ranks)))}, and"
      f" {CONFIG} has r={rank}"
    )


def _classifier(config: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
  """The base's config as that of a classifier with one label."""
  family = Keys(config, keys.where).text("model_type", "")
  return {
    "architectures": [CLASSIFIERS.get(family, family)],  # an unknown family is refused later
    "id2label": {"0": "LABEL_0"},
    SCORE_BIAS: keys.number(SCORE_BIAS, 0.0),
  }


def misfit(path: pathlib.Path, model: Model) -> str:
  """Why an adapter cannot be trained on as the model's, in words; '' if it can.

  Args:
    path: a folder that `open_adapter` has opened.
    model: with the adapter that is wanted.
  Raises:
    UserError: the folder cannot be read.
  """
  cfg, wanted = model.require_adapter(), peft_factors.factors(model)
  found = {n.removeprefix(_PREFIX): s for n, s in huggingface.read_shapes(path / WEIGHTS).items()}
  found.pop(_SCORE, None)
  ranks = {min(shape) for shape in found.values()}
  if ranks != {cfg.rank}:
    return (
      f"its rank is {' and '.join(map(str, sorted(ranks)))}, and config.adapter.rank={cfg.rank}"
    )
  if found != {factor.name: factor.shape for factor in wanted}:
    return f"it adapts other matrices than config.adapter.targets={cfg.targets}"
  return ""


def read_adapter(path: pathlib.Path, model: Model) -> Params:
  """The adapter tree of a folder for which `misfit` finds nothing, float32 on the host.

  B is scaled so that the product is the folder's under the model's own alpha / rank.

  Args:
    path, model: as for `misfit`; with a 'scalar' head the tree has the folder's score.
  Raises:
    UserError: the folder cannot be read.
  """
  keys, cfg = Keys(foreign.read_json(path / CONFIG), str(path / CONFIG)), model.require_adapter()
  shapes = huggingface.read_shapes(path / WEIGHTS)
  places = {name: (path / WEIGHTS, shape) for name, shape in shapes.items()}
  read = functools.partial(huggingface.read_tensor, places)
  root = 0.5 if keys.flag("use_rslora", False) else 1.0
  scale = keys.number("lora_alpha", 8.0) / cfg.rank**root / (cfg.alpha / cfg.rank)

  def of_factor(factor: peft_factors.Factor) -> np.ndarray:
    tensor = read(_PREFIX + factor.name)
    return tensor * np.float32(scale) if ".lora_B." in factor.name else tensor

  trained = {"layers": peft_factors.to_params(model, of_factor)}
  if model.head == "scalar":
    bias = np.float32(keys.number(SCORE_BIAS, 0.0))
    trained["head"] = {"w_D": np.asarray(read(_PREFIX + _SCORE), np.float32)[0], "bias": bias}
  return trained


# --- out ------------------------------------------------------------------------------------------


def write_adapter(folder: pathlib.Path, model: Model, trained: Params, base: str):
  """Writes an adapter that `peft` loads onto its base.

  Args:
    folder: an existing folder.
    model: with the adapter; with an 'lm' head it loads as CAUSAL_LM, with a 'scalar' head as SEQ_CLS, whose score lacks
      the bias: add the config's instructjax_score_bias.
    trained: the adapter tree, with its head.
    base: what `peft` finds the base under, a folder or ORG/NAME.
  Raises:
    UserError: the files cannot be written.
  """
  cfg = model.require_adapter()
  pairs = peft_factors.from_params(model, trained)
  tensors = [
    (_PREFIX + factor.name, factor.shape, functools.partial(np.asarray, array))
    for factor, array in pairs
  ]
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": cfg.rank,
    "lora_alpha": cfg.alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": _targets(model, [factor.name for factor, _ in pairs]),
    "fan_in_fan_out": model.network.position == "learned",
    "inference_mode": True,
  }
  if model.head == "scalar":
    head = np.asarray(trained["head"]["w_D"], np.float32)[None]
    tensors.append((_PREFIX + _SCORE, head.shape, lambda: head))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    config[SCORE_BIAS] = float(trained["head"]["bias"])
  with writing(folder):
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    huggingface.write_safetensors(folder / WEIGHTS, tensors)


def _targets(model: Model, adapted: list[str]) -> list[str]:
  """peft's target_modules for these factors: the shortest ends of module names that no other module has."""
  modules = {match[1] for name in adapted if (match := _FACTOR.fullmatch(name))}
  everything = {
    tensor.name.removesuffix(".weight")
    for tensor in tensor_table.listed(model.network, model.vocab_size, model.head)
  }
  ends = lambda name, parts: ".".join(name.split(".")[-parts:])
  others = everything - modules
  found = set()
  for module in modules:
    short = ends(module, 1)
    is_shared = any(ends(other, 1) == short for other in others)
    found.add(ends(module, 2) if is_shared else short)
  return sorted(found)
