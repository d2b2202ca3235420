"""Has answers scored by other models: toxicity, truth, information. Called by command.py, after all is answered.

The numbers are kept with the samples, so that another scorer reads the same answers and no model is asked again.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from instructjax.core.errors import UserError
from instructjax.evaluation import journal, scorers
from instructjax.evaluation.runner import Planned
from instructjax.evaluation.scorers import Scorer

_KEY = "scorers"  # in the file that says what a part was made with


@dataclasses.dataclass(frozen=True)
class Judge:
  """A scorer that is loaded when it is first needed.

  Attributes:
    spec: as the user gave it.
    load: opens it.
  """

  spec: str
  load: Callable[[str], Scorer]

  @property
  def identity(self) -> str:
    """What tells this scorer from another, or from one of the same place that was trained anew."""
    if self.spec.startswith(scorers.PYTHON):
      return hashlib.sha256(repr((self.spec, scorers.source(self.spec))).encode()).hexdigest()
    # SCHEME:PLACE?OPTIONS or a path. A place that is none has no files.
    place = self.spec.removeprefix("judge:").partition("?")[0]
    root = pathlib.Path(os.path.expanduser(place))
    found = sorted(path for path in [root, *root.rglob("*")] if path.is_file())
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found]
    return hashlib.sha256(repr((self.spec, files)).encode()).hexdigest()


def require_all(planned: Sequence[Planned], given: Collection[str]):
  """Refuses scorers of which a task needs more than are given. It would keep the numbers of an earlier run, or none.

  Raises:
    UserError: there is such a task.
  """
  for part in planned:
    lacking = [name for name in part.task.judges if name not in given]
    if lacking and len(lacking) < len(part.task.judges):
      raise UserError(
        f"{part.name} is judged as {' and as '.join(part.task.judges)}, and --scorers has no {lacking[0]}:"
        f" give {_all_of(part.task.judges)}"
      )


def _all_of(names: Sequence[str]) -> str:
  return "--scorers=" + ",".join(f"{name}=SPEC" for name in names)


def judge_all(
  models: Sequence[str],
  planned: Sequence[Planned],
  judges: Mapping[str, Judge],
  out: pathlib.Path,
  told: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
  """Scores the answers of all tasks that ask for it, with the scorers that are given.

  Where they are not, what an earlier run of the command has scored is used.

  Args:
    models: names of the models.
    planned: what they were asked; all is answered.
    judges: name -> scorer.
    out: folder of the evaluation.
    told: called with a line about each part that is scored.
  Returns:
    Name -> {"name", "auc"} of each scorer whose numbers are used.
  Raises:
    UserError: a scorer cannot be opened, or gives what is no probability; or no scorers are given, and earlier runs
      have scored some answers by one and some by another.
  """
  used: dict[str, dict[str, Any]] = {}
  first: dict[
    str, tuple[str, str]
  ] = {}  # name -> (identity of its scorer, what it was first seen to have scored)
  opened: dict[str, Scorer] = {}
  for part in planned:
    if not part.task.judges:
      continue
    are_given = set(part.task.judges) <= judges.keys()
    wanted = {name: judges[name].identity for name in part.task.judges} if are_given else {}
    for model in models:
      files = journal.part(out, model, part.name, part.prompt)
      made_with = json.loads(files.made_with.read_text(encoding="utf-8"))
      known = made_with.get(_KEY, {})
      # Without scorers, the numbers of an earlier run of the command stay, and their scorers are named.
      if are_given and {name: one["identity"] for name, one in known.items()} != wanted:
        told(f"{model}: {part.name}/{part.prompt}: {', '.join(wanted)}")
        for name in wanted:
          opened[name] = opened.get(name) or judges[name].load(judges[name].spec)
        _judge(part, model, files, {name: opened[name] for name in wanted})
        known = {
          name: {"identity": wanted[name], "name": opened[name].name, "auc": opened[name].auc}
          for name in wanted
        }
        journal.write_json(files.made_with, made_with | {_KEY: known})
      title = f"{model} on {part.name}/{part.prompt}"
      for name, one in known.items():
        identity, where = first.setdefault(name, (one["identity"], title))
        if identity != one["identity"]:
          raise UserError(
            f"{title} and {where} were judged by two scorers as {name}; give {_all_of(part.task.judges)}, so that one"
            " judges all"
          )
      used |= {name: {key: one[key] for key in ("name", "auc")} for name, one in known.items()}
  return used


def _judge(part: Planned, model: str, files: journal.Part, by: Mapping[str, Scorer]):
  title = f"{model} on {part.name}/{part.prompt}"
  samples = journal.read_samples(files, len(part.asked.items), title)
  answered = [i for i, sample in enumerate(samples) if "answer" in sample]
  texts = [part.task.judge_text(part.asked.items[i], samples[i]["answer"]) for i in answered]
  found = {name: scorer.score(texts) if texts else [] for name, scorer in by.items()}
  for name, values in found.items():
    if not all(0 <= value <= 1 for value in values):
      raise UserError(
        f"scorer {by[name].name} must give probabilities from 0 to 1 to be used as {name}"
      )
  for number, i in enumerate(answered):
    judged = {name: values[number] for name, values in found.items()}
    scores = samples[i]["scores"] | dict(part.task.from_judges(judged))
    samples[i] |= {"judged": judged, "scores": scores}
  journal.write_samples(files, samples)
