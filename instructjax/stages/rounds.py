"""Measures what further rounds of comparisons bought: each round's reward model on all rounds' rankings and policies.

Called by evaluate.py in runs with `collect.rounds` above 1.
"""

from collections.abc import Mapping, Sequence

from instructjax.core.stages import RANKED, of_round
from instructjax.report.results import Measured, Round
from instructjax.stages import answers, lineage, policies, ranking_accuracy
from instructjax.stages.context import Context


def measure(
  ctx: Context, prompts: Sequence[str], measured: Mapping[str, Measured]
) -> tuple[Round, ...]:
  """Has every round's reward model judge the rankings and the policies of all rounds; () if there is one round.

  Args:
    ctx: the run.
    prompts: the test prompts, one for each answer.
    measured: policy -> its answers to them.
  Raises:
    UserError: weights or rankings cannot be read.
    Preempted: the run was told to stop.
  """
  numbers = range(1, ctx.config.collect.rounds + 1)
  if len(numbers) == 1:
    return ()
  return tuple(_round(ctx, number, numbers, prompts, measured) for number in numbers)


def _round(ctx: Context, number: int, numbers: range, prompts, measured) -> Round:
  params = policies.load_reward(ctx, stage=of_round("rm", number))

  def score(policy: str):
    found = measured[policy]
    scored = answers.from_text(ctx, list(prompts), found.answer, found.ended)
    return answers.score(ctx, ctx.model("reward"), params, scored)

  judge = lambda records: ranking_accuracy.judge(ctx, params, records)
  heldout = [_by_heldout_labelers(ctx, other) for other in numbers]
  return Round(
    number=number,
    judgements=tuple(judge(_rankings(ctx, other)) for other in numbers),
    heldout=tuple(judge(records) if records else None for records in heldout),
    reward={name: score(name) for name in (of_round(RANKED, other) for other in numbers)},
  )


def _rankings(ctx: Context, number: int) -> list:
  """The held-out rankings of a round. Where people rank, those of the first are the config's source."""
  if number == 1 and not lineage.collects(ctx.config):
    return ctx.data.records("comparisons", "validation")
  return ctx.data.collected(of_round("collect", number), "validation")


def _by_heldout_labelers(ctx: Context, number: int) -> list:
  """A round's rankings by held-out labelers; [] if there are none with an order, as where people rank and none do."""
  if number == 1 and not lineage.collects(ctx.config):
    return []
  stage = of_round("collect", number)
  path = ctx.directory(stage) / "heldout.jsonl"
  if path.is_file() and not path.stat().st_size:  # one that is gone is refused by who reads it
    return []
  found = ctx.data.collected(stage, "heldout")
  return found if any(len({*ranking.ranks}) > 1 for ranking in found) else []
