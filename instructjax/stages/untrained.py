"""Answers that need no training: what any policy must beat before its score means something.

Called by evaluate.py. No answer here is chosen by test prompts.
"""

import numpy as np

from instructjax.core.stages import UNTRAINED
from instructjax.data import sources
from instructjax.stages import lineage
from instructjax.stages.context import Context

_FIRST = 8  # training prompts on which all lines are tried
_KEPT = 64  # lines that are then tried on all training prompts


def answers_without_training(ctx: Context, prompts: list[str]) -> dict[str, list[str]]:
  """For each of `UNTRAINED` that the run's data allow, an answer to every prompt.

  Args:
    ctx: the run.
    prompts: the prompts of the evaluation; each stands there once for each answer.
  Returns:
    echo: the prompt itself.
    best_line: of all training demonstrations the answer with the best mean gold score on the training prompts, given to
      every prompt; only where there is a gold score. A part of it that is a pass of the base is left out of the choice:
      all lines with several prompts would take hours.
    random_line: the answer of a training demonstration drawn at random.
    demonstrations: the demonstrations of the test prompts themselves, in turn; only if each prompt has one.
  """
  simulation = sources.simulation(ctx.config.data.prompts)
  echo = simulation.echo if simulation is not None else str.strip
  found = {"echo": [echo(prompt) for prompt in prompts]}
  if "demonstrations" in lineage.reads(ctx.config, "evaluate"):
    if simulation is not None:
      lines = sorted({one.response for one in ctx.data.records("demonstrations", "train")})
      asked = [one.prompt for one in ctx.data.records("prompts", "train")]
      found["best_line"] = [best_line(simulation.score_without_base, lines, asked)] * len(prompts)
    found["random_line"] = _random_lines(ctx, len(prompts))
    own = _demonstrations(ctx, prompts)
    if own is not None:
      found["demonstrations"] = own
  return {name: found[name] for name in UNTRAINED if name in found}


def best_line(gold_score, lines: list[str], prompts: list[str]) -> str:
  """The line with the highest mean gold score as the answer to all prompts.

  To save time, all lines are first tried on a few prompts spread over the list, and the best of them on all prompts.

  Args:
    gold_score: function of prompts and as many answers.
    lines: the lines to choose from.
    prompts: training prompts.
  """

  def best(lines, prompts, count):
    asked = [prompt for prompt in prompts for _ in lines]
    scores = np.asarray(gold_score(asked, lines * len(prompts))).reshape(len(prompts), -1)
    return [lines[i] for i in np.argsort(-scores.mean(axis=0), kind="stable")[:count]]

  few = prompts[:: max(1, len(prompts) // _FIRST)][:_FIRST]
  return best(best(lines, few, _KEPT), prompts, 1)[0]


def _random_lines(ctx: Context, count: int) -> list[str]:
  # From the tokens on disk: a large set of demonstrations is not read as text.
  store = ctx.data.tokens("demonstrations", "train").sequences()
  rng = np.random.default_rng(ctx.config.seed)
  tokenizer = ctx.tokenizer
  lines = []
  for i in rng.integers(len(store), size=count).tolist():
    one = store[i]
    response = one.ids[one.num_unweighted :]
    if response and response[-1] in tokenizer.stop_ids:
      response.pop()
    lines.append(tokenizer.decode(response).strip())
  return lines


def _demonstrations(ctx: Context, prompts: list[str]) -> list[str] | None:
  by_prompt: dict[str, list[str]] = {}
  for one in ctx.data.records("demonstrations", "test"):
    by_prompt.setdefault(one.prompt, []).append(one.response)
  if any(prompt not in by_prompt for prompt in prompts):
    return None
  seen: dict[str, int] = {}
  found = []
  for prompt in prompts:
    own, turn = by_prompt[prompt], seen.get(prompt, 0)
    seen[prompt] = turn + 1
    found.append(own[turn % len(own)].strip())
  return found
