"""Best-of-n (rejection sampling): writes, for each prompt, the answer of n that the reward model scores highest.

The file, `best_of_n/answers.jsonl`, has the form of a user's own demonstrations, so that `sft` can read it. Prompts are
answered in parts. Each part is a file of its own until the stage is finished, so a run that was stopped goes on.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from instructjax.core import results
from instructjax.core.errors import UserError, reason, writing
from instructjax.core.stages import STAGES
from instructjax.data.records import Chat
from instructjax.data.tokenizer import prompt_ids
from instructjax.stages import answers, lineage, policies
from instructjax.stages.context import Context, finish, is_finished, stage_run
from instructjax.train import finished

FILE = "answers.jsonl"
_PARTS = "parts"
_MADE_WITH = "made_with.json"
_PROMPTS = 64  # prompts of a part


def choose(score_PN: np.ndarray, is_usable_PN: np.ndarray) -> np.ndarray:
  """The place of the best usable answer to each prompt, the first of equals; -1 where none is usable.

  Args:
    score_PN: the reward model's scores of n answers to each of P prompts.
    is_usable_PN: False for answers that may not be chosen.
  """
  masked_PN = np.where(is_usable_PN, score_PN, -np.inf)
  return np.where(is_usable_PN.any(axis=1), masked_PN.argmax(axis=1), -1)


def as_demonstration(prompt: str | Chat, answer: str) -> dict[str, Any]:
  """A row that `data.demonstrations=jsonl:` reads. A chat stays a list of messages, which alone gets a template."""
  if isinstance(prompt, Chat):
    messages = [{"role": role, "content": text} for role, text in prompt.messages]
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}
  return {"prompt": prompt, "response": answer}


def _prompts(ctx: Context, stage: str) -> list[tuple[str | Chat, str]]:
  """The prompts to answer, in a random order: (as it was read, as text).

  Raises:
    UserError: there are fewer than `best_of_n.num_prompts`, or a chat template refuses a prompt.
  """
  cfg, limit = ctx.config.best_of_n, ctx.config.data.max_prompt_length
  found, chats = [], ctx.tokenizer.chats
  for record in ctx.data.raw_records("prompts", "train"):
    prompt = record.prompt
    text = prompt
    if isinstance(prompt, Chat):
      messages = [{"role": role, "content": content} for role, content in prompt.messages]
      (text,) = chats.render_all([messages])
      if isinstance(text, UserError):
        if ctx.config.data.on_bad_record == "raise":
          raise UserError(f"data.prompts: a chat prompt cannot be made text: {text}") from text
        continue
    if len(prompt_ids(ctx.tokenizer, text)) <= limit:
      found.append((prompt, text))
  if cfg.num_prompts > len(found):
    raise UserError(
      f"config.best_of_n.num_prompts={cfg.num_prompts} must not exceed the {len(found)} training prompts of"
      f" config.data.prompts={ctx.config.data.prompts!r} that are not too long; 0 is all of them"
    )
  order = np.random.default_rng(ctx.data_seed(stage)).permutation(len(found))
  return [found[i] for i in order[: cfg.num_prompts or None]]


def check(ctx: Context, stage: str):
  """Checks that there are as many prompts as are to be answered.

  Raises:
    UserError: there are fewer.
  """
  _prompts(ctx, stage)


def _answer(
  ctx: Context, stage: str, number: int, part: Sequence[tuple[str | Chat, str]], weights: Mapping
) -> list[dict[str, Any]]:
  """Answers the prompts of a part, and chooses: a row for each prompt, without an answer where none ended."""
  cfg = ctx.config.best_of_n
  repeated = [text for _, text in part for _ in range(cfg.n)]
  sampled = answers.sample(
    ctx,
    ctx.model("policy"),
    weights["policy"],
    [prompt_ids(ctx.tokenizer, text) for text in repeated],
    jax.random.fold_in(
      ctx.key(stage), number
    ),  # a part's own: it does not matter where a run was stopped
    temperature=cfg.temperature,
    to_newline=STAGES[lineage.stage_of(ctx.config, cfg.policy)].is_base,
  )
  scored = answers.from_text(ctx, repeated, sampled.text, sampled.ended_N)
  score_PN = answers.score(ctx, ctx.model("reward"), weights["reward"], scored).reshape(-1, cfg.n)
  # A demonstration ends with EOS. An answer that was cut off would teach to end in the middle.
  usable_N = np.array([bool(text) for text in sampled.text]) & sampled.ended_N
  rows = []
  for place, ((prompt, _), best) in enumerate(
    zip(part, choose(score_PN, usable_N.reshape(-1, cfg.n)))
  ):
    row = {"scores": [float(score) for score in score_PN[place]]}
    if best >= 0:
      text = sampled.text[place * cfg.n + best]
      row = as_demonstration(prompt, text) | {"score": float(score_PN[place, best])} | row
    rows.append(row)
  return rows


def _write(path: pathlib.Path, text: str):
  """Writes a file at once: it is there with all of its text, or not at all."""
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


def _lines(rows: Sequence[Mapping]) -> str:
  return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or reason(error)}") from error
  except ValueError as error:
    raise UserError(f"{path} is damaged; delete it, and the run makes it again") from error


def run(ctx: Context, stage: str):
  """Answers training prompts, chooses, and writes the answers as demonstrations.

  Raises:
    UserError: the stage was made with other settings, files cannot be read or written, or no answer ended by itself.
    Preempted: the run was told to stop.
  """
  cfg = ctx.config.best_of_n
  run_ = stage_run(ctx, stage)
  if is_finished(run_):
    return
  directory = ctx.directory(stage)
  parts_folder = directory / _PARTS
  made_with = parts_folder / _MADE_WITH
  if made_with.exists():
    (before,) = _read(made_with)
    finished.require_same_run(directory, before, run_.fingerprint, run_.files)
  elif jax.process_index() == 0:
    _write(made_with, json.dumps(run_.fingerprint) + "\n")
  prompts = _prompts(ctx, stage)
  parts = [prompts[start : start + _PROMPTS] for start in range(0, len(prompts), _PROMPTS)]
  path_of = lambda number: parts_folder / f"{number:06}.jsonl"
  # Asked before any of them is sampled, which takes all processes: all see the same files.
  missing = [number for number in range(len(parts)) if not path_of(number).exists()]
  weights = {"policy": policies.load(ctx, cfg.policy), "reward": policies.load_reward(ctx)}
  for number in missing:
    rows = _answer(ctx, stage, number, parts[number], weights)
    if jax.process_index() == 0:
      _write(path_of(number), _lines(rows))
  if jax.process_index() != 0:
    return
  rows = [row for number in range(len(parts)) for row in _read(path_of(number))]
  chosen = [row for row in rows if "score" in row]
  if not chosen:
    raise UserError(
      f"best_of_n: none of the {cfg.n} answers to each of {len(rows)} prompts ended by itself, and a demonstration"
      " has to; raise --config.data.max_response_length"
    )
  text = _lines(chosen)
  _write(directory / FILE, text)
  result = results.Chosen(
    prompts=len(chosen),
    left_out=len(rows) - len(chosen),
    reward=float(np.mean([row["score"] for row in chosen])),
    mean_reward=float(np.mean([row["scores"] for row in rows])),
    kl=float(np.log(cfg.n) - (cfg.n - 1) / cfg.n),
    file=hashlib.sha256(text.encode()).hexdigest(),
  )
  finish(ctx, stage, run_, None, result)
  with writing(parts_folder):
    shutil.rmtree(parts_folder)
