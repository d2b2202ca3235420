"""What a task of the evaluation is: how rows become items, items become prompts, and answers become scores.

A task is one file in `instructjax/evaluation/tasks/` with a `TASK`; `tasks/__init__.py` finds it there. This module
knows no model and no file: everything here is pure. Called by every module of the evaluation.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from instructjax.core.foreign import shown
from instructjax.data.messages import BadRecord, kind_of


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a data set.

  Attributes:
    where: its place, `file:line`.
    value: what JSON or the columns of a table hold.
  """

  where: str
  value: Any

  def text(self, *names: str, may_be_empty: bool = False) -> str:
    """The text under the first of the names that the row has.

    Raises:
      BadRecord: it is absent, no text or blank.
    """
    found = self.any(*names)
    if not isinstance(found, str):
      raise BadRecord(f"{self.where}: {names[0]!r} must be a text, got {kind_of(found)}")
    if not may_be_empty and not found.strip():
      raise BadRecord(f"{self.where}: {names[0]!r} is empty")
    return found

  def texts(self, *names: str, at_least: int = 1) -> list[str]:
    """The list of texts under the first of the names that the row has.

    Raises:
      BadRecord: it is absent, something else, or shorter than `at_least`.
    """
    return self.all_texts(self.any(*names), names[0], at_least)

  def choices(self, *names: str) -> tuple[str, ...]:
    """Two or more texts, none of them blank, under the first of the names that the row has.

    Raises:
      BadRecord: it is something else.
    """
    found = self.texts(*names, at_least=2)
    if not all(text.strip() for text in found):
      raise BadRecord(f"{self.where}: {names[0]!r} holds an empty text")
    return tuple(found)

  def all_texts(self, found: Any, name: str, at_least: int = 1) -> list[str]:
    """`found`, if it is a list of texts; arguments and errors as `texts`."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
      raise BadRecord(f"{self.where}: {name!r} must be a list of texts, got {kind_of(found)}")
    if len(found) < at_least:
      raise BadRecord(f"{self.where}: {name!r} must hold at least {at_least} texts")
    return found

  def label(self, count: int, *names: str) -> int:
    """The number of the right choice among `count`; it may be written as text, as some files do.

    Raises:
      BadRecord: it is absent, no whole number, or not below `count`. A label of -1 stands in rows whose answer is
        kept secret, which cannot be scored.
    """
    found = self.any(*names)
    if isinstance(found, str) and found.strip().removeprefix("-").isdecimal():
      found = int(found)
    if isinstance(found, bool):
      found = int(found)
    if type(found) is not int or not 0 <= found < count:
      raise BadRecord(
        f"{self.where}: {names[0]!r} must be a whole number from 0 to {count - 1}, got {shown(found)}"
      )
    return found

  def any(self, *names: str) -> Any:
    """The value under the first of the names that the row has.

    Raises:
      BadRecord: it is no object, or has none of them.
    """
    if not isinstance(self.value, Mapping):
      raise BadRecord(f"{self.where}: must be an object, got {kind_of(self.value)}")
    for name in names:
      if self.value.get(name) is not None:
        return self.value[name]
    raise BadRecord(f"{self.where}: lacks {' or '.join(map(repr, names))}")

  def inners(self, name: str) -> list["Row"]:
    """The parts in the list under a name.

    Raises:
      BadRecord: it is absent or no list.
    """
    found = self.any(name)
    if not isinstance(found, list):
      raise BadRecord(f"{self.where}: {name!r} must be a list, got {kind_of(found)}")
    return [self.inner(value, f"{name}[{i}]") for i, value in enumerate(found)]

  def column(self, name: str, key: str) -> list[Any]:
    """The values of a key: of an object of lists, as the hub's JSON has them, or of a list of objects, as tables have.

    Raises:
      BadRecord: there is neither under `name`, or an object lacks the key.
    """
    found = self.any(name)
    if isinstance(found, Mapping):
      values = self.inner(found, name).any(key)
      if not isinstance(values, list):
        raise BadRecord(f"{self.where}: {name}: {key!r} must be a list, got {kind_of(values)}")
      return values
    return [one.any(key) for one in self.inners(name)]

  def has(self, name: str) -> bool:
    return isinstance(self.value, Mapping) and self.value.get(name) is not None

  def inner(self, value: Any, place: str) -> "Row":
    """A part of the row, with its place in it for messages."""
    return Row(f"{self.where}: {place}", value)


@dataclasses.dataclass(frozen=True)
class Choices:
  """A question of which the model's probabilities are the answer: pairs of (context, continuation)."""

  pairs: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Question:
  """A question that the model answers in words, greedily, up to the first of `stops`.

  Attributes:
    prompt: the text that the model reads.
    max_new_tokens: longest answer [tokens].
    stops: texts before which the answer is cut; the paper cuts at the first newline.
  """

  prompt: str
  max_new_tokens: int
  stops: tuple[str, ...] = ("\n",)


Ask = Choices | Question


@dataclasses.dataclass(frozen=True)
class Choice:
  """What the model gives one continuation.

  Attributes:
    log_prob: nats, summed over its tokens.
    log_probs: nats of each token.
    tokens: the pieces of text.
    is_greedy: whether it is what greedy decoding would have written.
    is_cut: whether the context was too long for the model, and lost its beginning.
  """

  log_prob: float
  log_probs: tuple[float, ...]
  tokens: tuple[str, ...]
  is_greedy: bool
  is_cut: bool = False


Answer = Sequence[Choice] | str
# Numbers that an answer gets, by metric. A metric of a whole corpus has a list: what is summed over the items.
Scores = Mapping[str, float | Sequence[float]]
Show = Literal["share", "percent", "bits", "score"]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column of results.

  Attributes:
    key: its name in `Scores`.
    title: in tables.
    show: 'share' of 1, 'percent' of 100, 'bits', or 'score' (any other number).
    better: 1 if higher is better, -1 if lower is, 0 if neither is said to be.
    corpus: for a metric that is no mean over items: the value from the sums of the items' lists; None for a mean.
  """

  key: str
  title: str
  show: Show
  better: Literal[1, 0, -1]
  corpus: Callable[[Sequence[float]], float] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One way of asking a task's items.

  Attributes:
    title: in tables, such as "few-shot".
    ask: an item and the worked examples -> what is asked.
    metrics: keys of the metrics that the table shows; all others are in summary.json.
    shots: number of worked examples that `ask` wants.
  """

  title: str
  ask: Callable[[Any, Sequence[Any]], Ask]
  metrics: tuple[str, ...]
  shots: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
  """A task.

  Attributes:
    title: in tables.
    files: names of the file with the rows to be answered, with * and ?, below the folder of --data; the first that is
      there is taken. Compressed files (.gz, .bz2, .xz, .zst) are found by the name before the ending.
    shot_files: the same for the training split, which worked examples are drawn from.
    tfds: names in TensorFlow Datasets of both splits, `NAME:SPLIT`; "" if it has none.
    read: rows -> items. An item is a frozen dataclass of the task's own.
    group: item -> what items of one passage share; an item whose group is among the worked examples is not asked.
    prompts: name -> prompt.
    metrics: all metrics.
    score: item and answer -> scores. It may leave a metric out, of which the item is then no part.
    is_shot: whether an item may be a worked example.
    stratum: item -> the part of the data that it is from; with --limit, all parts are drawn from alike.
    judges: scorers (--scorers) of answers that another model judges.
    judge_text: item and answer -> what such a scorer reads: a text, or (prompt, answer).
    from_judges: the scorers' numbers of an answer, in [0, 1] -> further scores.
    require: raises UserError if a library that `score` needs is not installed.
  """

  title: str
  files: tuple[str, ...]
  read: Callable[[Iterable[Row]], Iterator[Any]]
  prompts: Mapping[str, Prompt]
  metrics: tuple[Metric, ...]
  score: Callable[[Any, Any], Scores]
  group: Callable[[Any], str]
  shot_files: tuple[str, ...] = ()
  tfds: tuple[str, str] = ("", "")
  is_shot: Callable[[Any], bool] = lambda item: True
  stratum: Callable[[Any], int] = lambda item: 0
  judges: tuple[str, ...] = ()
  judge_text: Callable[[Any, str], str | tuple[str, str]] = lambda item, answer: answer
  from_judges: Callable[[Mapping[str, float]], Scores] = dict
  require: Callable[[], None] = lambda: None


def each(parse: Callable[[Row], Any]) -> Callable[[Iterable[Row]], Iterator[Any]]:
  """`Task.read` for files with one item a row."""

  def read(rows: Iterable[Row]) -> Iterator[Any]:
    for row in rows:
      yield parse(row)

  return read
