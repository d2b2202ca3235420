"""Scorers of text: toxicity, truth, and the like, by whatever the user has.

Called by the evaluation's tasks. A scorer is named by a spec:

  FOLDER                          what `train_scorer` wrote: probabilities, with the AUC on held-out texts
  FOLDER[?label=NAME]             a sequence classifier of Hugging Face; the probability of a label
  judge:MODEL?ask=TEXT[&yes=..&no=..]  a language model that is asked, and answers yes or no
  python:MODULE:FUNCTION          a function from a list of texts, or of (prompt, answer) pairs, to a list of numbers

The last is how a service such as Perspective is given, see docs/evaluation.md.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import math
import os
import pathlib
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructjax.core import foreign
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.core.foreign import explained
from instructjax.evaluation import language_model, trained_scorer
from instructjax.parallel import sharding
from instructjax.train import weights

Item = str | tuple[str, str]  # a text, or a prompt and its answer
PYTHON, JUDGE = "python:", "judge:"
_NOT_INSTALLED = "scorer {spec} is run by transformers, which is not installed; run `pip install torch transformers`"
_BATCH = 16  # texts that a classifier of transformers reads at once


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
  """What gives every text a number.

  Attributes:
    name: as the user gave it.
    auc: area under the ROC curve on held-out labelled texts; None if it was not measured.
    call: items -> numbers; the more of what the scorer looks for, the higher.
  """

  name: str
  auc: float | None
  call: Callable[[Sequence[Item]], Sequence[float]]

  def score(self, items: Sequence[Item]) -> list[float]:
    """A number for each text, or (prompt, answer).

    Raises:
      UserError: the scorer gives another number of scores, or one that is not finite.
    """
    scores = [float(value) for value in self.call(list(items))]
    if len(scores) != len(items) or not all(map(math.isfinite, scores)):
      raise UserError(
        f"scorer {self.name} must give one finite number for each of {len(items)} texts, got {len(scores)} numbers"
      )
    return scores


def load(spec: str) -> Scorer:
  """Opens a scorer.

  Raises:
    UserError: there is no such scorer, or it cannot be opened.
  """
  return find(spec)()


def find(spec: str) -> Callable[[], Scorer]:
  """Looks for a scorer, which may be wanted only after hours, and returns what opens it.

  Raises:
    UserError: there is no such scorer.
  """
  if spec.startswith(PYTHON):
    function = _function(spec)
    return lambda: Scorer(spec, None, function)
  if spec.startswith(JUDGE):
    place, options = _asked(spec)
    found = weights.locate(place)
    if found.head != "lm":
      raise UserError(f"scorer {spec} must name a language model, and {place} ends in a score")
    return lambda: Scorer(spec, None, _judge(place, options))
  place, _, text = spec.partition("?")
  folder = pathlib.Path(os.path.expanduser(place))
  if (folder / trained_scorer.FILE).is_file():
    return lambda: _trained(spec, folder)
  if (folder / "config.json").is_file():
    options = _options(spec, text, ("label",))
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
      raise UserError(_NOT_INSTALLED.format(spec=spec))
    return lambda: Scorer(spec, None, _classifier(spec, folder, options))
  raise UserError(
    f"scorer {spec} must be a folder that train_scorer wrote, the folder of a sequence classifier,"
    f" {JUDGE}MODEL?ask=TEXT or {PYTHON}MODULE:FUNCTION"
  )


def _mesh():
  return sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=1, tensor=1))


def _options(spec: str, text: str, known: tuple[str, ...]) -> dict[str, str]:
  found = dict(urllib.parse.parse_qsl(text.replace("+", "%2B"), keep_blank_values=True))
  unknown = found.keys() - {*known}
  if unknown:
    raise UserError(
      f"scorer {spec} has no option {sorted(unknown)[0]}; there are {', '.join(known)}"
    )
  return found


def _trained(spec: str, folder: pathlib.Path) -> Scorer:
  card = trained_scorer.read(folder)
  model = language_model.open_reward_model(str(folder / trained_scorer.RUN / "rm"), _mesh())
  return Scorer(spec, card.auc, functools.partial(trained_scorer.probabilities, card, model))


def _asked(spec: str) -> tuple[str, dict[str, str]]:
  """Of judge:MODEL?...: the model, and what it is asked and may answer."""
  place, _, text = spec.removeprefix(JUDGE).partition("?")
  options = {"yes": " yes", "no": " no"} | _options(spec, text, ("ask", "yes", "no"))
  if not options.get("ask"):
    raise UserError(f"scorer {spec} must say what is asked, as {JUDGE}{place}?ask=True:")
  return place, options


def _judge(place: str, options: dict[str, str]) -> Callable[[Sequence[Item]], list[float]]:
  """The probability of yes against no after a text and what is asked.

  A pair is written as the judges of TruthfulQA read it: `Q: ...`, `A: ...`, and what is asked on a line of its own.
  """
  model = language_model.open_model(place, _mesh())

  def context(item: Item) -> str:
    shown = item if isinstance(item, str) else f"Q: {item[0]}\nA: {item[1]}"
    return f"{shown}\n{options['ask']}"

  def call(items: Sequence[Item]) -> list[float]:
    pairs = [(context(item), options[word]) for item in items for word in ("yes", "no")]
    found = [one.log_prob for one in language_model.log_probs(model, pairs)]
    odds = np.array(found[0::2]) - np.array(found[1::2])
    return (1 / (1 + np.exp(-np.clip(odds, -500, 500)))).tolist()

  return call


def _classifier(
  spec: str, folder: pathlib.Path, options: dict[str, str]
) -> Callable[[Sequence[Item]], list[float]]:
  """The probability of a label by a classifier that transformers runs."""
  try:
    import torch
    import transformers
  except ImportError as error:
    raise UserError(_NOT_INSTALLED.format(spec=spec)) from error
  try:
    words: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, local_files_only=True
    )
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"scorer {spec} cannot be opened: {explained(error)}") from error
  network.eval()
  names = [str(network.config.id2label[index]) for index in range(network.config.num_labels)]
  column = _column(spec, names, options.get("label"))
  is_several = network.config.problem_type == "multi_label_classification" or len(names) == 1

  def call(items: Sequence[Item]) -> list[float]:
    found = []
    for start in range(0, len(items), _BATCH):
      some = [
        item if isinstance(item, str) else list(item) for item in items[start : start + _BATCH]
      ]
      read = words(some, return_tensors="pt", padding=True, truncation=True)
      with torch.no_grad():
        logits = network(**read).logits.float()
      share = torch.sigmoid(logits) if is_several else torch.softmax(logits, dim=-1)
      found += share[:, column].tolist()
    return found

  return call


def _column(spec: str, names: list[str], label: str | None) -> int:
  """The number of the label whose probability is meant."""
  if label is None and len(names) <= 2:
    return len(names) - 1  # the second of two, which is the positive one
  if label not in names:
    raise UserError(
      f"scorer {spec} must name one of its labels with ?label=NAME; there are"
      f" {', '.join(foreign.named(name) for name in names[:20])}"
    )
  return names.index(label)


def source(spec: str) -> str:
  """What tells the code of python:MODULE:FUNCTION from that before a change: a hash of the module's file.

  Raises:
    UserError: it cannot be imported.
  """
  _function(spec)
  path = getattr(sys.modules[spec.removeprefix(PYTHON).partition(":")[0]], "__file__", None)
  is_file = path is not None and pathlib.Path(path).is_file()
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() if is_file else ""


def _function(spec: str) -> Callable[[Sequence[Item]], Sequence[float]]:
  module, _, name = spec.removeprefix(PYTHON).partition(":")
  if "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module), name)
  except Exception as error:  # a user's module may raise anything
    raise UserError(f"scorer {spec} cannot be imported: {explained(error)}") from error

  def call(items: Sequence[Item]) -> list[float]:
    try:
      found = function(items)
    except Exception as error:  # and so may a user's function
      place = traceback.extract_tb(error.__traceback__)[-1]
      raise UserError(
        f"scorer {spec} raised {type(error).__name__}: {explained(error)} ({place.filename}, line {place.lineno});"
        " mend the function, and run the same command again"
      ) from error
    try:
      return [float(value) for value in found]
    except Exception as error:
      raise UserError(f"scorer {spec} must give a list of numbers: {explained(error)}") from error

  return call
