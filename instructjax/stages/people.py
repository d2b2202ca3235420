"""Has the people of a labeling project rank what the current policy answers, while the run waits (sec 3.1).

Called by collect.py in later rounds of runs whose comparisons are `labels:PROJECT`. The answers are sampled once and
kept in `asked.json` of the stage's folder; they become items of the project, whose origin labelers do not see. The run
then ends, and the same command looks whether all are ranked. When they are, the rankings are written as the files that
a round of simulated labelers writes, and nothing that happens in the project later changes them.
"""

import json
import os
import pathlib
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from instructjax.core import results
from instructjax.core.config import Config
from instructjax.core.errors import UserError, Waiting, writing
from instructjax.core.stages import STAGES
from instructjax.data import label_records, readers
from instructjax.data.messages import quoted
from instructjax.data.records import Chat, Prompt
from instructjax.data.tokenizer import prompt_ids
from instructjax.parallel import distributed
from instructjax.stages import contents
from instructjax.stages.context import Context, finish
from instructjax.train import finished, reading, stage_runs

FILE = "asked.json"
MOST_ANSWERS = 9  # of a labeler's page, see labels/projects.py
LONGEST_USER = 80  # letters, see labels/projects.py

# (split, prompts, number of prompts) -> (text of a prompt, its answers) of each that was drawn.
Sample = Callable[[str, list[Any], int], list[tuple[str, list[str]]]]


def check_settings(config: Config):
  """Checks that people are given no more answers to a prompt than a page shows.

  Raises:
    UserError: they are.
  """
  if config.collect.max_responses > MOST_ANSWERS:
    raise UserError(
      f"config.collect.max_responses={config.collect.max_responses} must be at most {MOST_ANSWERS} where people rank"
    )


def check(ctx: Context):
  """Checks that the project can be opened, and can hold the prompts.

  Raises:
    UserError: it cannot, or the extra `label` is not installed.
  """
  for split in ("train", "validation"):
    _originals(ctx, split)
  if jax.process_index() == 0:  # which alone writes there
    _open(_project(ctx)).close()


def _open(place: str) -> Any:
  try:
    # Imported here: other runs do without what it needs.
    from instructjax.labels import schema
  except ImportError as error:
    raise UserError(
      f"answers for people to rank need {error.name}: {label_records.EXTRA}"
    ) from error
  return schema.open_(place)


def collect(ctx: Context, stage: str, run: stage_runs.StageRun, sample: Sample):
  """Puts answers into the project if they are not there, and takes the rankings if people have finished.

  Args:
    ctx: the run.
    stage: the stage, of a round after the first.
    run: as `stage_run` made it.
    sample: draws prompts and samples answers to them.
  Raises:
    Waiting: rankings are missing.
    UserError: the project cannot be read or written; the answers were sampled with other settings; or people have
      skipped so much that a split has no ranking.
    Preempted: the run was told to stop.
  """
  place = _project(ctx)
  asked = _read(run)
  if asked is None:
    asked = _draw(ctx, run, sample)
    _write_json(ctx.directory(stage) / FILE, asked)
  told = f"{stage} waits for people"
  if jax.process_index() == 0:
    state = _put(ctx, stage, place, asked)
    if state.missing:
      told = _waiting(ctx, stage, place, asked, state)
    else:
      _take(ctx, stage, run, place, asked["batch"])
  distributed.meet(f"{stage} asked")
  if ctx.done(stage) is None:
    raise Waiting(told)


def _project(ctx: Context) -> str:
  found = readers.labeling_project(ctx.config.data.comparisons)
  if found is None:
    raise ValueError("comparisons that are not collected in later rounds come from a project")
  return found[0]


def _read(run: stage_runs.StageRun) -> dict[str, Any] | None:
  """What was sampled before; None if nothing was.

  Raises:
    UserError: it was sampled with other settings, or the file is damaged.
  """
  path = run.directory / FILE
  if not path.is_file():
    return None
  advice = f"Delete {run.directory} to sample and ask anew."
  asked = reading.read(path, lambda: json.loads(path.read_text(encoding="utf-8")), advice=advice)
  if not isinstance(asked, dict) or asked.keys() != {"batch", "fingerprint", "rows"}:
    raise UserError(f"cannot read {path}: it was not written by a run. {advice}")
  finished.require_same_run(run.directory, asked["fingerprint"], run.fingerprint, run.files)
  return asked


def _draw(ctx: Context, run: stage_runs.StageRun, sample: Sample) -> dict[str, Any]:
  """Samples answers to prompts of both splits, no prompt twice."""
  cfg, rows = ctx.config.collect, []
  for split, most in (("train", cfg.num_prompts), ("validation", cfg.num_heldout_prompts)):
    originals = _originals(ctx, split)
    prompts = [Prompt(text) for text in originals]
    for text, answers in sample(split, prompts, min(most, len(prompts))):
      prompt, user = originals[text]
      rows.append({"prompt": prompt, "user": user, "split": split, "answers": answers})
  name = f"{ctx.workdir.name}/{run.name}/{secrets.token_hex(4)}"
  return {"batch": name, "fingerprint": dict(run.fingerprint), "rows": rows}


def _originals(ctx: Context, split: Any) -> dict[str, tuple[Any, str]]:
  """Text of each prompt that fits -> the prompt as people are to see it (a text, or messages), and who wrote it or ''.

  Raises:
    UserError: no prompt is short enough, or the name of a user is too long.
  """
  raw: dict[str, Any] = {}
  for record in ctx.data.raw_records("prompts", split):
    raw[record.where] = (
      None if record.where in raw else record.prompt
    )  # None: the place tells nothing
  result = {}
  for record in ctx.data.records("prompts", split):
    ids = prompt_ids(ctx.tokenizer, record.prompt)
    if len(ids) <= ctx.config.data.max_prompt_length:
      seen = raw.get(record.where)
      is_chat = isinstance(seen, Chat)
      messages = [{"role": role, "content": text} for role, text in seen.messages] if is_chat else 0
      if len(record.user or "") > LONGEST_USER:
        raise UserError(
          f"{record.where or 'data.prompts'}: user {quoted(record.user, 40)} must have at most {LONGEST_USER} letters"
          " where people rank"
        )
      result.setdefault(record.prompt, (messages or record.prompt, record.user or ""))
  if not result:
    raise UserError(f"data.prompts: no {split} prompt has at most data.max_prompt_length tokens")
  return result


def _write_json(path: pathlib.Path, value: Any):
  """Process 0 writes a file, whole or not at all."""
  if jax.process_index() != 0:
    return
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _put(ctx: Context, stage: str, place: str, asked: dict[str, Any]):
  """Makes items of what was sampled, if there are none yet, and returns how far people are."""
  from instructjax.labels import projects, rounds, schema

  (parent,) = STAGES[stage].parents
  cfg, batch = ctx.config.collect, asked["batch"]
  prompt = lambda found: (
    found if isinstance(found, str) else Chat(tuple((one["role"], one["content"]) for one in found))
  )
  new = [
    projects.Item(
      "ranking",
      prompt(row["prompt"]),
      tuple((text, str(ctx.workdir / parent)) for text in row["answers"]),
      author=row["user"],
      wanted=cfg.wanted,
      split=row["split"],
      batch=batch,
    )
    for row in asked["rows"]
  ]
  database = _open(place)
  try:
    with schema.refusals(place):
      if not rounds.put(database, new, time.time(), ctx.data_seed(stage)):
        rounds.want(database, batch, cfg.wanted)
      return rounds.state(database, batch)
  finally:
    database.close()


def _waiting(ctx: Context, stage: str, place: str, asked: dict[str, Any], state) -> str:
  """What people have to do, in a line."""
  of = shlex.quote(place)
  held_out = sum(row["split"] == "validation" for row in asked["rows"])
  each = ctx.config.collect.wanted
  many = state.missing > 1
  return (
    f"{stage} waits for people: {state.missing} ranking{'s are' if many else ' is'} missing of the {state.items} items"
    f" (batch {asked['batch']}, {held_out} of them held out) that are to be ranked by {each}"
    f" labeler{'s' * (each > 1)} each in the project {place}. Labelers find them where `python -m instructjax.label"
    f" serve --project={of}` runs. When all are ranked, the same command goes on; to go on with those that are ranked,"
    f" give `python -m instructjax.label close --project={of} --batch={shlex.quote(asked['batch'])}` before"
  )


def _take(ctx: Context, stage: str, run: stage_runs.StageRun, place: str, batch: str):
  """Writes the rankings, by part, and marks the stage as finished."""
  parts: dict[str, list[dict[str, Any]]] = {name: [] for name in contents.SPLITS}
  for row, part in label_records.of_batch(place, batch):
    parts[part].append(row)
  for split in ("train", "validation"):
    if not parts[split]:
      raise UserError(
        f"{stage}: people have ranked no {'training' if split == 'train' else 'held-out'} item of batch {batch} in"
        f" {place}; have some ranked, or delete {ctx.directory(stage)} to ask anew"
      )
  for name, rows in parts.items():
    _write_rows(ctx.directory(stage) / f"{name}.jsonl", rows)
  digests = ctx.contents.of_written(stage).digests
  finish(
    ctx, stage, run, None, results.Collected(None, dict(zip(contents.SPLITS, digests, strict=True)))
  )


def _write_rows(path: pathlib.Path, rows: Sequence[dict[str, Any]]):
  with writing(path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
