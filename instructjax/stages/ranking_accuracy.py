"""How often a reward model prefers what labelers preferred, and how sure it is of it. Called by rm.py and rounds.py."""

import itertools
from collections.abc import Sequence

import numpy as np

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.data.tokenize import RankingTokens, tokenize_rankings
from instructjax.ops import preference
from instructjax.stages import answers
from instructjax.stages.context import Context


def tokenized(ctx: Context, records: list) -> list:
  """Rankings as token lists; those that are too long are left out and counted.

  Raises:
    UserError: a prompt has more ranked answers than `rm.max_responses`, or every ranking is too long.
  """
  data = ctx.config.data
  rankings = tokenize_rankings(
    records,
    ctx.tokenizer,
    max_prompt_length=data.max_prompt_length,
    max_response_length=data.max_response_length,
  )
  most = max((len(item.responses) for item in rankings), default=0)
  if most > ctx.config.rm.max_responses:
    raise UserError(
      f"a prompt has {most} ranked responses; raise rm.max_responses={ctx.config.rm.max_responses}"
    )
  return rankings


def score_rankings(
  ctx: Context, params: Params, rankings: Sequence[RankingTokens]
) -> list[np.ndarray]:
  """The scores of each ranking's answers, in their order."""
  sequences = [item.prompt + response for item in rankings for response in item.responses]
  score_N = answers.score_tokens(ctx, ctx.model("reward"), params, sequences)
  return np.split(score_N, np.cumsum([len(item.responses) for item in rankings])[:-1])


def pair_margins(score_K: np.ndarray, rank_K: Sequence[int]) -> np.ndarray:
  """The score of the preferred answer minus that of the other, for each pair of answers that is not a tie."""
  return np.array(
    [
      score_K[i] - score_K[j] if rank_K[i] < rank_K[j] else score_K[j] - score_K[i]
      for i, j in itertools.combinations(range(len(rank_K)), 2)
      if rank_K[i] != rank_K[j]
    ]
  )


def _calibration(margin_N: np.ndarray) -> results.Calibration:
  found = preference.calibration(margin_N)
  plain = {name: np.asarray(value).tolist() for name, value in found._asdict().items()}
  bins = {name: tuple(value) for name, value in plain.items() if name != "expected_error"}
  return results.Calibration(**bins, expected_error=plain["expected_error"])


def judge(ctx: Context, params: Params, records: list) -> results.Judgement:
  """Judges a reward model on rankings: accuracy over pairs that are not ties, calibration, and the spread of scores.

  Args:
    ctx: the run.
    params: the reward model's parameters, with or without its bias, which cancels in differences of scores.
    records: held-out rankings.
  Raises:
    UserError: the rankings hold nothing but ties, or see `tokenized`.
    Preempted: the run was told to stop.
  """
  rankings = tokenized(ctx, records)
  score = score_rankings(ctx, params, rankings)
  margins = [pair_margins(s, item.ranks) for s, item in zip(score, rankings)]
  # The standard error is over prompts: pairs of one prompt share answers, so they are not independent, and neither are
  # several rankings of one prompt, which count as one here.
  _, which = np.unique([str(item.prompt) for item in rankings], return_inverse=True)
  right = np.bincount(which, [np.sum(m > 0) for m in margins])
  total = np.bincount(which, [len(m) for m in margins])
  if not total.sum():
    raise UserError(
      f"{len(records)} held-out rankings hold no pair that is not a tie; add rankings with an order"
    )
  accuracy = right.sum() / total.sum()
  # Accuracy is a ratio of two sums over prompts; this is the ratio's standard error by the delta method.
  stderr = np.sqrt(np.sum((right - accuracy * total) ** 2)) / total.sum()
  return results.Judgement(
    accuracy=float(accuracy),
    accuracy_stderr=float(stderr),
    pairs=int(total.sum()),
    prompts=len(total),
    score_std=float(np.std(np.concatenate(score))),
    calibration=_calibration(np.concatenate(margins)),
  )
