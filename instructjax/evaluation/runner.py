"""Asks models the questions of tasks: opens what is needed, goes on where it was stopped, and scores the answers.

Called by the command and tests, who give the functions of a model in `Engine`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data.checksums import FileChecksums
from instructjax.evaluation import items, journal, rows
from instructjax.evaluation.task import Answer, Ask, Choice, Choices, Question, Task

Told = Callable[[int, Any], None]
Fit = Literal["whole", "cut", "too long"]


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model's two functions; see language_model.py. Results are handed to the last argument as they come.

  Attributes:
    log_probs: of (context, continuation) pairs.
    generate: the greedy answers to questions.
    fit: whether the model reads all of what is asked, loses its beginning, or cannot be asked because a continuation is
      longer than what it reads at once.
    put: how this model is asked: all questions of a prompt at once -> what it reads in their places.
  """

  log_probs: Callable[[Sequence[tuple[str, str]], Told], Any]
  generate: Callable[[Sequence[Question], Told], Any]
  fit: Callable[[Ask], Fit]
  put: Callable[[Sequence[Ask]], Sequence[Ask]] = lambda asks: asks


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to be evaluated.

  Attributes:
    name: as the user calls it.
    checksum: what its weights are recognised by.
    open: loads it, which may take long and is done only if something is left to be asked.
  """

  name: str
  checksum: str
  open: Callable[[], Engine]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is asked.

  Attributes:
    tasks: (name of a task, names of its prompts).
    limit: at most so many items of a task; None for all.
    seed: chooses items and worked examples.
    redo: whether results that were made with something else are replaced.
    dtype: numbers that models compute with, which results depend on.
  """

  tasks: Mapping[str, tuple[str, ...]]
  limit: int | None
  seed: int
  redo: bool
  dtype: str


@dataclasses.dataclass(frozen=True)
class Planned:
  """A prompt of a task with its items, and what identifies them.

  Attributes:
    name, prompt: of the task and of the prompt.
    task: the task.
    asked: its items and questions.
    spec: the file or spec of its rows.
    made_with: what results depend on beside the model.
  """

  name: str
  prompt: str
  task: Task
  asked: items.Asked
  spec: str
  made_with: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A task that is not asked, why not, and how to mend it."""

  name: str
  reason: str
  mend: str


def plan(
  tasks: Mapping[str, Task], data: rows.Data, settings: Settings, out: pathlib.Path
) -> tuple[list[Planned], list[Skipped]]:
  """Reads the data of all tasks, so that what is wrong with it shows before any model is loaded.

  Args:
    tasks: name -> task, of all there are.
    data: what --data says.
    settings: what is asked.
    out: folder of the evaluation.
  Raises:
    UserError: a file cannot be read, or a row cannot be used.
  """
  planned: list[Planned] = []
  skipped: list[Skipped] = []
  checksums = FileChecksums(out / "checksums.json", lambda: None)
  for name, prompts in settings.tasks.items():
    task = tasks[name]
    needs_shots = any(task.prompts[prompt].shots for prompt in prompts)
    loaded = items.load(name, task, data, needs_shots=needs_shots)
    if loaded is None:
      mend = (
        f"put a file {' or '.join(task.files)} below --data, or name one with --data={name}=FILE"
      )
      skipped.append(Skipped(name, "no data", mend))
      continue
    task.require()
    content = checksums.content(loaded.spec, rows.files(loaded.spec)).checksum
    for prompt in prompts:
      asked = items.ask(task, prompt, loaded, limit=settings.limit, seed=settings.seed)
      made_with = {
        "data": content,
        "limit": str(settings.limit),
        "seed": str(settings.seed),
        "dtype": settings.dtype,
        "prompt": _checksum(asked.asks),
        "set of answers": _checksum(asked.items),
      }
      planned.append(Planned(name, prompt, task, asked, loaded.spec, made_with))
  return planned, skipped


def _checksum(values: Sequence[Any]) -> str:
  return hashlib.sha256("\n".join(map(repr, values)).encode()).hexdigest()


def answer_all(
  models: Sequence[Model],
  planned: Sequence[Planned],
  settings: Settings,
  out: pathlib.Path,
  told: Callable[[str, str, int, int], None],
):
  """Asks every model what it has not been asked yet.

  Args:
    models: the models; each is loaded once, after the one before it has been let go.
    planned: what they are asked.
    settings: what is asked.
    out: folder of the evaluation.
    told: called with (model, task and prompt, results so far, results in all) whenever a result is kept.
  Raises:
    UserError: results in `out` were made with something else, a model cannot be opened, or a file not be written.
  """
  for model in models:  # all of them first, so that nothing is computed before a refusal
    for part in planned:
      made_with = {"model": model.checksum, **part.made_with}
      title = f"{model.name} on {part.name}/{part.prompt}"
      journal.require_same(_files(out, model, part), made_with, redo=settings.redo, title=title)
  total = len(models) * sum(journal.count(ask) for part in planned for ask in part.asked.asks)
  done = 0
  for model in models:
    engine = None
    for part in planned:
      files, title = _files(out, model, part), f"{part.name}/{part.prompt}"
      needed = sum(map(journal.count, part.asked.asks))
      if not files.samples.exists():
        engine = engine or model.open()
        found = journal.Journal(files.journal)
        start = done + needed - len(found.missing(part.asked.asks))

        def kept(count: int, start=start, title=title, name=model.name):
          told(name, title, start + count, total)

        try:
          asks = engine.put(part.asked.asks)
          fits = [engine.fit(ask) for ask in asks]
          _ask(engine, asks, fits, found, kept)
          samples = [_sample(part, i, asks[i], fit, found) for i, fit in enumerate(fits)]
        finally:
          found.close()
        journal.write_samples(files, samples)
      done += needed
      told(model.name, title, done, total)


def _files(out: pathlib.Path, model: Model, part: Planned) -> journal.Part:
  return journal.part(out, model.name, part.name, part.prompt)


def _ask(
  engine: Engine,
  asks: Sequence[Ask],
  fits: Sequence[Fit],
  found: journal.Journal,
  kept: Callable[[int], None],
):
  """Gets what is missing from the model, and keeps each result as it comes."""
  can_be_asked = lambda keys: [key for key in keys if fits[key[0]] != "too long"]
  missing = can_be_asked(found.missing(asks))
  scored, written = [], []
  for key in missing:
    (scored if isinstance(asks[key[0]], Choices) else written).append(key)
  counted = 0

  def keep(key: tuple[int, int], result: Any):
    nonlocal counted
    found.add(*key, result if isinstance(result, str) else _choice(result))
    counted += 1
    kept(counted)

  if scored:
    pairs = [_pair(asks[i], j) for i, j in scored]
    engine.log_probs(pairs, lambda number, result: keep(scored[number], result))
  if written:
    questions = [ask for i, _ in written if isinstance(ask := asks[i], Question)]
    engine.generate(questions, lambda number, text: keep(written[number], text))
  left = can_be_asked(found.missing(asks))
  if left:
    raise ValueError(f"the model left {len(left)} of {len(missing)} requests without a result")


def _pair(ask: Ask, choice: int) -> tuple[str, str]:
  if not isinstance(ask, Choices):
    raise ValueError("a question in words has no choices")
  return ask.pairs[choice]


def _choice(result: Any) -> Choice:
  """A result of the model, whatever else it holds."""
  return Choice(
    float(result.log_prob),
    tuple(map(float, result.log_probs)),
    tuple(result.tokens),
    bool(result.is_greedy),
    bool(result.is_cut),
  )


def _sample(
  part: Planned, number: int, ask: Ask, fit: Fit, found: journal.Journal
) -> dict[str, Any]:
  """A finished sample: what was asked, what was answered, and the scores; none if it could not be asked.

  Args:
    part: what is asked.
    number: of the item in it.
    ask: as the model read it, through its chat template if it has one.
    fit: whether it fitted.
    found: the answers.
  """
  item = part.asked.items[number]
  sample: dict[str, Any] = {"number": part.asked.numbers[number], "item": dataclasses.asdict(item)}
  if fit == "too long":
    return sample | {"fit": fit, "scores": {}}
  answer = found.answer(number, ask)
  if not isinstance(answer, str) and any(choice.is_cut for choice in answer):
    fit = "cut"
  return sample | {"fit": fit, **_told(ask, answer), "scores": dict(part.task.score(item, answer))}


def _told(ask: Ask, answer: Answer) -> dict[str, Any]:
  if isinstance(ask, Choices) and not isinstance(answer, str):
    contexts = {context for context, _ in ask.pairs}
    shared = contexts.pop() if len(contexts) == 1 else None
    choices = [
      ({} if shared is not None else {"prompt": context})
      | {"continuation": continuation}
      | journal.plain(choice)
      for (context, continuation), choice in zip(ask.pairs, answer, strict=True)
    ]
    return {"prompt": shared, "choices": choices}
  if isinstance(ask, Choices):
    raise ValueError("choices are answered with probabilities")
  return {"prompt": ask.prompt, "answer": answer}


def scores(
  models: Sequence[str], part: Planned, out: pathlib.Path
) -> dict[str, dict[str, np.ndarray]]:
  """Model -> metric -> the scores of all items, NaN for an item that is no part of a metric.

  A metric of a whole corpus has an array of [items, numbers].
  """
  result: dict[str, dict[str, np.ndarray]] = {}
  for model in models:
    title = f"{model} on {part.name}/{part.prompt}"
    files = journal.part(out, model, part.name, part.prompt)
    samples = journal.read_samples(files, len(part.asked.items), title)
    if [sample.get("number") for sample in samples] != list(part.asked.numbers):
      raise UserError(f"{title}: {files.samples} is damaged; delete it, and run the command again")
    result[model] = {}
    for metric in part.task.metrics:
      values = [sample["scores"].get(metric.key) for sample in samples]
      if all(value is None for value in values):
        continue
      missing = [np.nan] * max(len(v) for v in values if v is not None) if metric.corpus else np.nan
      result[model][metric.key] = np.asarray(
        [missing if value is None else value for value in values], float
      )
  return result


def fits(models: Sequence[str], part: Planned, out: pathlib.Path) -> dict[str, dict[str, int]]:
  """Model -> how many items were "cut", so that the prompt lost its beginning, and how many were "too long"."""
  result = {}
  for model in models:
    files = journal.part(out, model, part.name, part.prompt)
    samples = journal.read_samples(files, len(part.asked.items), model)
    found = [sample["fit"] for sample in samples]
    result[model] = {fit: found.count(fit) for fit in ("cut", "too long")}
  return result
