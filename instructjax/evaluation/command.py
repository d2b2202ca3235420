"""What the command `evaluate` does: asks the models, and writes and shows the results. Called by evaluate.py.

Beside runner.py this is the module that knows models; what it does with their answers is in summary.py and
report/evaluation.py.
"""

import dataclasses
import functools
import hashlib
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from instructjax.core import terminal
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError, writing
from instructjax.data import chat, chat_files
from instructjax.data.tokenizer import prompt_ids
from instructjax.evaluation import (
  chatting,
  encoding,
  judging,
  language_model,
  rows,
  runner,
  scorers,
  summary,
  tasks,
)
from instructjax.evaluation.language_model import Dtype
from instructjax.evaluation.task import Ask, Question
from instructjax.models import execution
from instructjax.parallel import sharding
from instructjax.report import costs
from instructjax.report import evaluation as report
from instructjax.train import finished, weights

DTYPES: Mapping[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16"}
_SECONDS = 20.0  # between two lines of progress


def run(
  models: Mapping[str, str],
  data: rows.Data,
  settings: runner.Settings,
  out: pathlib.Path,
  scorer_specs: Mapping[str, str],
  chats: Collection[str] = (),
):
  """Asks all models all tasks, and writes samples, summary.json and index.html below `out`.

  Args:
    models: name -> path.
    data: what --data says.
    settings: what is asked.
    out: folder of the results.
    scorer_specs: name -> scorer of answers, of `tasks.JUDGES`.
    chats: names of the models that are asked through their chat templates.
  Raises:
    UserError: no task has data, a scorer is not there; or see `runner.answer_all`.
  """
  with finished.workdir_lock(out):
    planned, skipped = runner.plan(tasks.found(), data, settings, out)
    for one in skipped:
      to = terminal.console(stderr=True)
      terminal.say(f"skipped: {one.name}: {one.reason}; {one.mend}", to=to)
    if not planned:
      raise UserError("none of the tasks that were asked has data: see above, and --data")
    judging.require_all(planned, scorer_specs)
    for spec in scorer_specs.values():
      scorers.find(spec)
    opened = [
      _model(name, path, out, DTYPES[settings.dtype], name in chats)
      for name, path in models.items()
    ]
    runner.answer_all(opened, planned, settings, out, progress())
    judges = {name: judging.Judge(spec, scorers.load) for name, spec in scorer_specs.items()}
    say = lambda line: terminal.say(f"scoring {line}", to=terminal.console(stderr=True))
    used = judging.judge_all(list(models), planned, judges, out, say)
    parts = []
    for part in planned:
      found = runner.scores(list(models), part, out)
      fits = runner.fits(list(models), part, out)
      parts.append(summary.part(part, found, fits, settings.seed))
    shown = {
      "limit": settings.limit,
      "seed": settings.seed,
      "dtype": settings.dtype,
      "scorers": used,
    }
    asked_as = {
      name: f"{path}, asked through its chat template" if name in chats else path
      for name, path in models.items()
    }
    whole = summary.whole(asked_as, parts, skipped, shown, peak_memory())
    summary.write(out / "summary.json", whole)
    report.write(out / "index.html", whole)
    of_run = out.resolve().parent / "report" / "index.html"
    is_shown_there = of_run.is_file() and report.put_into(of_run, whole)
  _show(whole)
  if is_shown_there:
    terminal.say(f"shown in the run's report too: {of_run}")
  terminal.say(f"written: {out / 'index.html'}, {out / 'summary.json'} and {out / 'samples'}")


def _show(whole: Mapping[str, Any]):
  terminal.show(report.results_table(whole))
  if len(whole["models"]) > 1:
    terminal.show(report.differences_table(whole))
  if whole["findings"]:
    terminal.show(report.findings_table(whole))
  for line in (*report.note_lines(whole), *report.scorer_lines(whole)):
    terminal.say(line)
  terminal.say(f"peak memory: {report.peak_memory(whole)}")


def peak_memory() -> dict[str, int | None]:
  """The most memory that this process has had, of the machine and of a device; None if that has none of its own."""
  unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
  return {"machine_bytes": host, "device_bytes": max(peaks, default=None)}


def dtype(asked: str) -> str:
  """The numbers that are computed with, which 'auto' leaves to the devices."""
  if asked != "auto":
    return asked
  return execution.for_inference(jax.default_backend()).dtype


def _model(name: str, path: str, out: pathlib.Path, dtype: Dtype, is_chat: bool) -> runner.Model:
  """The model of a name.

  Raises:
    UserError: it cannot be opened, or has no chat template to be asked through.
  """
  found = weights.locate(path)
  tokenizer = found.tokenizer
  if is_chat and not tokenizer.chats.has_template:
    raise UserError(f"--chat={name}: {path} has no chat template; leave {name} out of --chat")
  known = found.checksum(out / "checksums.json") + repr((tokenizer.fingerprint, tokenizer.stop_ids))
  if (
    found.done is not None
  ):  # its settings are in the fingerprint, and its results tell two runs of them apart
    known += repr(found.done.result)
  known += "chat" * is_chat
  checksum = hashlib.sha256(known.encode()).hexdigest()
  clock = _clock(out) if is_chat and tokenizer.chats.has_clock else None
  return runner.Model(name, checksum, lambda: _engine(path, dtype, is_chat, clock))


def _clock(out: pathlib.Path) -> str:
  """The date and time that all chats of an evaluation see, also where it goes on another day."""
  known = chat_files.read_clock(out)
  if known is None:
    known = chat.now()
    with writing(out):
      chat_files.write_clock(out, known)
  return known


def _engine(path: str, dtype: Dtype, is_chat: bool, clock: str | None) -> runner.Engine:
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=1, tensor=1), jax.devices())
  with terminal.loading():
    model = language_model.open_model(path, mesh, dtype=dtype)

  def generate(questions: Sequence, told: Callable):
    requests = [
      language_model.Request(question.prompt, question.stops, _room(model, question))
      for question in questions
    ]
    return language_model.generate(model, requests, told)

  engine = runner.Engine(
    lambda pairs, told: language_model.log_probs(model, pairs, told),
    generate,
    functools.partial(fit, model),
  )
  if not is_chat:
    return engine
  chats = model.tokenizer.chats
  if chats.clock is None and clock is not None:  # a run has fixed its own
    chats = dataclasses.replace(chats, special=dataclasses.replace(chats.special, clock=clock))
  put = functools.partial(chatting.as_chats, chats.render_all)
  return dataclasses.replace(engine, put=put)


def _room(model: language_model.LanguageModel, question: Question) -> int:
  """Tokens of an answer: half of what the model reads at once is left to the prompt."""
  return min(question.max_new_tokens, max(1, model.max_length // 2))


def fit(model: language_model.LanguageModel, ask: Ask) -> runner.Fit:
  """See `runner.Engine`. A text is encoded only if its bytes do not settle it: a token has one or more."""
  if isinstance(ask, Question):
    room = model.max_length - _room(model, ask)
    is_short = len(ask.prompt.encode()) < room
    is_whole = is_short or len(prompt_ids(model.tokenizer, ask.prompt)) <= room
    return "whole" if is_whole else "cut"
  for context, continuation in ask.pairs:
    if len(continuation.encode()) + 2 > model.max_length:
      _, after = encoding.pair_ids(model.tokenizer, context, continuation, model.first_id)
      if len(after) > model.max_length:
        return "too long"
  return "whole"


def progress() -> Callable[[str, str, int, int], None]:
  """A function that shows how far an evaluation is: a line whenever some seconds have passed or a prompt is done."""
  began = said = time.monotonic()
  first = last = None
  at = -1  # results at the last line

  def told(model: str, title: str, done: int, total: int):
    nonlocal said, first, last, at
    first = done if first is None else first
    now = time.monotonic()
    is_due = now - said >= _SECONDS or (model, title) != last or done == total
    if not is_due or done == at:
      return
    last, said, at = (model, title), now, done
    rate = (done - first) / max(now - began, 1e-9)
    left = (
      f", about {costs.duration((total - done) / rate)} left" if rate > 0 and done < total else ""
    )
    terminal.say(
      f"{model}: {title}: {done} of {total} requests{left}", to=terminal.console(stderr=True)
    )

  return told
