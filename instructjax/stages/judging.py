"""The gold score and the labelers of a run's simulated task, which may ask the run's base how fluent an answer is.

Called by `collect`, `ppo` and `evaluate`. A task whose gold score needs no network is a module of `data/`; for one that
reads the base, the base is a frozen judge: no policy's weights and no reward model play a part.
"""

from collections.abc import Sequence

import numpy as np

from instructjax.data import sources
from instructjax.stages import answers, policies
from instructjax.stages.context import Context, bare


def simulation(ctx: Context):
  """The gold score and the labelers of the task that the run's prompts are of; None for prompts of a user's own."""
  found = sources.simulation(ctx.config.data.prompts)
  if found is None or not found.READS_BASE:
    return found
  return found.judged_by(_base_logprob(ctx))


def require_simulation(ctx: Context):
  """As `simulation`, for a run that collects comparisons.

  Raises:
    UserError: its prompts are not those of a simulated task.
  """
  sources.require_simulation(ctx.config.data.prompts)
  return simulation(ctx)


def _base_logprob(ctx: Context):
  """Makes the function (prompts, texts) -> mean log-probability of a text's tokens under the base."""
  kept: dict[tuple[str, str], float] = {}  # labelers read the same answers several times

  def mean_logprob(prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    rows = list(zip(prompts, texts, strict=True))
    new = list(dict.fromkeys(row for row in rows if row not in kept))
    if new:
      found = answers.mean_logprob(
        ctx, bare(ctx.model("policy")), policies.load(ctx, "base"), *zip(*new)
      )
      kept.update(zip(new, found.tolist()))
    return np.array([kept[row] for row in rows])

  return mean_logprob
