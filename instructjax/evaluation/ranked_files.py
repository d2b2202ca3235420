"""Reads ranked answers and has reward models score them. Called by rewards_command.py."""

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.core.foreign import JSON_BYTES, named, parse_json, read_text
from instructjax.core.text import json_line
from instructjax.data import sources
from instructjax.data.records import Chat, Ranking
from instructjax.data.tokenizer import Tokenizer
from instructjax.evaluation.reward_models import TIES, Entry, Item

REWARDBENCH = "rewardbench2:"
_BYTES = 64 * JSON_BYTES  # of a file that is read as a whole
# (prompt, answer) pairs -> a score of each.
Score = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


def rankings(spec: str, flag: str) -> list[Ranking]:
  """All rankings of a source, as `data.comparisons` names one; a bare path of a .jsonl file will do too.

  Args:
    spec: the source.
    flag: what gave it, for messages, as `--data`.
  Raises:
    UserError: the source cannot be read, or a row is no ranking.
  """
  source = f"jsonl:{spec}" if spec.endswith(".jsonl") and ":" not in spec else spec
  found = sources.load(
    places.expand_source(source, flag),
    "comparisons",
    "all",
    seed=0,
    validation_fraction=0.5,
    on_bad_record="raise",
    setting=flag,
  )
  return [record for record in found if isinstance(record, Ranking)]


def finite(score: Score, pairs: Sequence[tuple[str, str]]) -> list[float]:
  """A score of each pair.

  Raises:
    UserError: one is not a finite number; or as `score`.
  """
  scores = [float(value) for value in score(pairs)]
  for (prompt, answer), value in zip(pairs, scores, strict=True):
    if not math.isfinite(value):
      raise UserError(
        f"the score of answer {named(answer, 60)} to {named(prompt, 60)} is {value}, and must be a finite number:"
        " the model's weights may be damaged"
      )
  return scores


def scored(found: Sequence[Ranking], tokenizer: Tokenizer, score: Score) -> list[Item]:
  """The rankings with a reward model's scores.

  Raises:
    UserError: a chat cannot be rendered with the model's template, an answer is too long, or a score is not finite.
  """
  rendered = sources.render(found, tokenizer.chats.render_all, on_bad_record="raise")
  rows = [row for row in rendered if isinstance(row, Ranking)]
  # Not `str(...)`: a rendered chat is a text whose control tokens count.
  prompts = [row.prompt for row in rows if isinstance(row.prompt, str)]
  pairs = [(prompt, answer) for prompt, row in zip(prompts, rows) for answer in row.responses]
  scores = iter(finite(score, pairs))
  return [
    Item(prompt, row.responses, row.ranks, [next(scores) for _ in row.responses], row.labeler)
    for prompt, row in zip(prompts, rows, strict=True)
  ]


def json_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """(FILE:LINE, row) of each row of a jsonl file.

  Raises:
    UserError: the file cannot be read, or a row is no JSON object.
  """
  # Not splitlines(): a text in JSON may hold other characters that end lines, as U+2028.
  for number, line in enumerate(read_text(path, _BYTES).split("\n"), start=1):
    if line.strip():
      where = f"{path}:{number}"
      yield where, parse_json(line, where)


def rewardbench_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of RewardBench 2 in a jsonl file, as `to_json` of its data set writes them.

  Raises:
    UserError: the file cannot be read, or a row is not as the data set's; it names file and line.
  """
  rows = []
  for where, row in json_rows(path):
    texts = lambda key, row=row: (
      isinstance(row.get(key), list)
      and bool(row[key])
      and all(isinstance(text, str) for text in row[key])
    )
    good = all(isinstance(row.get(key), str) for key in ("id", "prompt", "subset"))
    if not (good and texts("chosen") and texts("rejected")):
      raise UserError(
        f"{where}: must have id, prompt and subset as texts, and chosen and rejected as lists of texts, as rows of"
        " RewardBench 2 do"
      )
    kind, _, place = row["id"].partition(":")
    if row["subset"] == TIES and (kind not in ("ref", "tied") or not place):
      raise UserError(
        f"{where}: id={named(row['id'])} of subset {TIES} must be ref:NUMBER or tied:NUMBER"
      )
    rows.append(row)
  if not rows:
    raise UserError(f"{path} has no rows")
  return rows


def scored_entries(
  rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, score: Score
) -> list[Entry]:
  """Rows of RewardBench 2 with a reward model's scores; prompts go through its chat template if it has one.

  Raises:
    UserError: the template refuses a prompt, or an answer is too long for the model.
  """
  asked = [
    Ranking(
      Chat((("user", row["prompt"]),)) if tokenizer.chats.has_template else row["prompt"],
      (*row["chosen"], *row["rejected"]),
      (1,) * len(row["chosen"]) + (2,) * len(row["rejected"]),
    )
    for row in rows
  ]
  return [
    Entry(row["id"], row["subset"], len(row["chosen"]), item.scores)
    for row, item in zip(rows, scored(asked, tokenizer, score), strict=True)
  ]


def write_scores(path: pathlib.Path, items: Sequence[Item]):
  """Writes the scores beside what they were given for, a line a ranking."""
  with open(path, "w", encoding="utf-8") as file:
    for item in items:
      row = {
        "prompt": item.prompt,
        "responses": list(item.answers),
        "ranks": list(item.ranks),
        "labeler": item.labeler,
        "scores": list(item.scores),
      }
      file.write(json_line(row) + "\n")
