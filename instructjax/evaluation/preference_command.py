"""What the command `preference` does: has answers judged, and shows who is preferred to whom.

Called by commands/preference.py. What is measured is in preference.py.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from instructjax.core import places, terminal
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError, writing
from instructjax.core.foreign import named
from instructjax.data import sources
from instructjax.data.controls import Rendered
from instructjax.data.ranking import is_score
from instructjax.evaluation import language_model, preference, ranked_files, scorers
from instructjax.evaluation.preference import Answers
from instructjax.evaluation.resampling import shown
from instructjax.parallel import sharding

# Quickest first: so they judge, and a mistake in a quick one is told before a model has worked for an hour.
KINDS = ("people", "gold", "labelers", "judge", "rm")
_RANKED = 9  # answers that a simulated labeler can rank at once
Verdicts = Mapping[tuple[str, str], np.ndarray]


def run(answers: str, judges: Sequence[str], baseline: str, *, out: str, bootstrap: int, seed: int):
  """Has the answers judged by all judges; writes preference.json and prints tables.

  Args:
    answers: a file of answers, or a run's folder.
    judges: KIND=WHAT of `KINDS`.
    baseline: the policy that habits are compared with; '' for `sft`, or else the first.
    out: folder of the results.
    bootstrap, seed: of the intervals.
  Raises:
    UserError: a value is wrong, a file or model cannot be read, or the results cannot be written.
  """
  named_judges = parse_judges(judges)
  folder = pathlib.Path(places.require(out, "--out"))
  found, notes = read_answers(pathlib.Path(places.require(answers, "--answers")))
  baseline = baseline or ("sft" if "sft" in found.answers else next(iter(found.answers)))
  if baseline not in found.answers:
    raise UserError(f"--baseline={named(baseline)} must be one of {', '.join(found.answers)}")
  settings = {"bootstrap": bootstrap, "seed": seed}
  verdicts = {
    spelled: judge(*named_judges[spelled], found, seed)
    for spelled in sorted(named_judges, key=lambda spelled: KINDS.index(named_judges[spelled][0]))
  }
  wins = {
    spelled: preference.every_pair(found, verdicts[spelled], **settings) for spelled in named_judges
  }
  results = {
    "prompts": len(set(found.prompt_N)),
    "wins": wins,
    "habits": preference.habits(found, baseline),
    "baseline": baseline,
    "metadata": preference.metadata(notes, **settings) if notes else {},
  }
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (folder / "preference.json").write_text(text, encoding="utf-8")
  for table in tables(results):
    terminal.show(table)
  terminal.say(f"written: {folder / 'preference.json'}")


def parse_judges(values: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Spelling -> (kind, what) of --judges.

  Raises:
    UserError: a kind is not known, or what it needs is missing.
  """
  result = {}
  for value in values:
    kind, _, what = value.partition("=")
    if kind not in KINDS or not what:
      raise UserError(
        f"--judges={named(value)} must be rm=PATH, judge=SCORER, gold=demo:, labelers=demo: or people=jsonl:FILE"
      )
    result[value] = (kind, what)
  if not result:
    raise UserError(
      "--judges must name who judges, as rm=runs/demo/rm, gold=demo: or people=jsonl:FILE"
    )
  return result


def read_answers(path: pathlib.Path) -> tuple[Answers, list[tuple[str, str, dict[str, float]]]]:
  """The answers of all policies, and what labelers noted of them.

  Args:
    path: a run's folder, its evaluate/answers.jsonl, or a jsonl file of one answer a row: prompt, model, answer, and
      perhaps metadata, an object of numbers and yes or no. The n-th answers of all models to a prompt belong together.
  Raises:
    UserError: the file cannot be read, a row is none, there is one policy only, or a policy lacks an answer.
  """
  path = path / "evaluate" / "answers.jsonl" if path.is_dir() else path
  by_prompt: dict[str, dict[str, list[str]]] = collections.defaultdict(
    lambda: collections.defaultdict(list)
  )
  notes = []
  for where, row in ranked_files.json_rows(path):
    prompt: Any = row.get("prompt")
    answers: Any = row.get("answers")
    if answers is None and isinstance(row.get("model"), str):
      answers = {row["model"]: row.get("answer")}
    is_row = isinstance(prompt, str) and isinstance(answers, dict) and bool(answers)
    if not is_row or not all(isinstance(text, str) for text in answers.values()):
      raise UserError(
        f"{where}: must have prompt and answers (policy: text), or prompt, model and answer, all of text"
      )
    prompt = Rendered(prompt) if row.get("is_rendered") is True else prompt
    for name, text in answers.items():
      by_prompt[prompt][name].append(text)
    if row.get("metadata") is not None and "model" in row:
      notes.append((prompt, row["model"], _notes(row["metadata"], where)))
  return _aligned(by_prompt, path), notes


def _aligned(by_prompt: Mapping[str, Mapping[str, list[str]]], path: pathlib.Path) -> Answers:
  names = list(dict.fromkeys(name for row in by_prompt.values() for name in row))
  if len(names) < 2:
    raise UserError(f"{path} has answers of {len(names)} policies, and it takes two to compare")
  prompts: list[str] = []
  answers: dict[str, list[str]] = {name: [] for name in names}
  for prompt, row in by_prompt.items():
    counts = {name: len(row.get(name, ())) for name in names}
    if len(set(counts.values())) > 1:
      shown = ", ".join(f"{name} {count}" for name, count in counts.items())
      raise UserError(
        f"{path}: all policies must answer a prompt equally often, and {named(prompt, 60)} has answers of {shown}"
      )
    prompts += [prompt] * counts[names[0]]
    for name in names:
      answers[name] += row[name]
  return Answers(prompts, answers)


def _notes(values: Any, where: str) -> dict[str, float]:
  if not isinstance(values, dict) or not all(
    isinstance(value, bool) or is_score(value) for value in values.values()
  ):
    raise UserError(f"{where}: metadata must be an object of finite numbers and of true or false")
  return {name: float(value) for name, value in values.items()}


def judge(kind: str, what: str, found: Answers, seed: int) -> Verdicts:
  """The verdicts of one judge on all pairs of policies.

  Raises:
    UserError: it cannot be opened, or cannot judge these answers.
  """
  if kind == "people":
    rows = [
      (str(r.prompt), r.responses, r.ranks) for r in ranked_files.rankings(what, "--judges=people")
    ]
    verdicts, unused = preference.from_rankings(found, rows)
    if unused == len(rows):
      raise UserError(f"--judges=people={named(what)}: no ranking is of two of the answers")
    if unused:
      terminal.say(
        f"people={what}: {unused} of {len(rows)} rankings are of no two of the answers, and not used"
      )
    return verdicts
  if kind == "labelers":
    return _labelers(_simulation(kind, what), found, seed)
  return preference.from_scores(_scores(_scorer(kind, what), found))


def _scores(score: ranked_files.Score, found: Answers) -> dict[str, list[float]]:
  """The score of each answer; equal answers are scored once."""
  pairs = list(
    dict.fromkeys(pair for texts in found.answers.values() for pair in zip(found.prompt_N, texts))
  )
  known = dict(zip(pairs, ranked_files.finite(score, pairs), strict=True))
  return {
    name: [known[pair] for pair in zip(found.prompt_N, texts)]
    for name, texts in found.answers.items()
  }


def _scorer(kind: str, what: str) -> ranked_files.Score:
  if kind == "judge":
    return scorers.load(what).score
  if kind == "gold":
    task = _simulation(kind, what)
    return lambda pairs: list(task.gold_score([p for p, _ in pairs], [a for _, a in pairs]))
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=1, tensor=1), jax.devices())
  with terminal.loading():
    model = language_model.open_reward_model(
      places.require(what, "--judges=rm", places.WEIGHTS), mesh
    )
  return lambda pairs: language_model.rewards(model, pairs)


def _simulation(kind: str, what: str) -> Any:
  task = sources.simulation(what)
  if task is None or task.READS_BASE:
    raise UserError(
      f"--judges={kind}={named(what)} must be demo:, the simulated task whose scores need no model"
    )
  return task


def _labelers(task: Any, found: Answers, seed: int) -> Verdicts:
  """Simulated labelers rank each prompt's answers of all policies, a pair at a time if there are too many."""
  names = list(found.answers)
  whole = [names] if len(names) <= _RANKED else list(map(list, itertools.combinations(names, 2)))
  verdicts: dict[tuple[str, str], np.ndarray] = {}
  for number, group in enumerate(whole):
    rows = [
      (prompt, [found.answers[name][i] for name in group])
      for i, prompt in enumerate(found.prompt_N)
    ]
    ranked = task.collect_rankings(rows, "heldout", seed, number * len(rows))
    places_ = np.array([ranking.ranks for ranking in ranked])
    for i, j in itertools.combinations(range(len(group)), 2):
      verdicts[group[i], group[j]] = preference.outcomes(-places_[:, i], -places_[:, j])
  return verdicts


def tables(results: Mapping[str, Any]) -> list[terminal.Table]:
  """The tables to show: win rates over the baseline by each judge, habits, and what labelers noted."""
  baseline = results["baseline"]
  result = [_wins(wins, by, baseline) for by, wins in results["wins"].items()]
  result.append(_habits(results["habits"], baseline))
  if notes := results["metadata"]:
    keys = list(dict.fromkeys(key for row in notes.values() for key in row))
    rows = [[name, *(shown(row.get(key)) for key in keys)] for name, row in notes.items()]
    columns = ["answers of", *keys]
    result.append(terminal.Table(columns=columns, rows=rows, title="noted by labelers"))
  return result


def _wins(wins: Mapping[str, Mapping[str, Any]], by: str, baseline: str) -> terminal.Table:
  columns = [
    *("answers of", "judged", f"preferred to {baseline}", "ties", "at equal length"),
    *("is longer", "by length alone", "share explained by length"),
  ]
  rows = [
    [
      name,
      str(row["judged"]),
      shown(row["win_rate"]),
      f"{row['ties']:.3f}",
      shown(row["length_controlled"]),
      shown(row["longer"]),
      shown(row["length_alone"]),
      "" if row["explained"] is None else f"{row['explained']:.2f}",
    ]
    for name, over in wins.items()
    if (row := over.get(baseline))
  ]
  return terminal.Table(columns=columns, rows=rows, title=f"judged by {by}")


def _habits(found: Mapping[str, Mapping[str, Any]], baseline: str) -> terminal.Table:
  columns = [
    *("answers of", "repeat a word pair", "words copied", "different", "words"),
    *("in the 10 most frequent words", "favourite word", "in its answers"),
    f"in those of {baseline}",
  ]
  rows = [
    [
      name,
      *(f"{row[key]:.3f}" for key in ("repeats", "copied", "distinct")),
      f"{row['words']:.1f}",
      "" if row["frequent"] is None else f"{row['frequent']:.3f}",
      row["spam"][0],
      *(f"{value:.3f}" for value in row["spam"][1:]),
    ]
    for name, row in found.items()
  ]
  return terminal.Table(columns=columns, rows=rows, title="habits")
