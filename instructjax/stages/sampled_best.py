"""Best-of-n of the PPO initialisation, chosen by the reward model, from one pool of sampled answers.

Called by evaluate.py, which sets it beside the policies: it needs no RL, and its KL has a closed form.
"""

import dataclasses

import numpy as np

from instructjax.core.stages import REFERENCE
from instructjax.report.results import BestAtKL, BestOfN
from instructjax.stages import answers, policies
from instructjax.stages.context import Context


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
  """Scores of N answers of the PPO initialisation to each of P prompts; gold is None if there are no gold scores."""

  reward_PN: np.ndarray
  gold_PN: np.ndarray | None


def divergence(n: int) -> float:
  """KL(best of n || policy) = log n - (n - 1) / n, in nats (Nakano et al. 2021, App. I)."""
  return float(np.log(n) - (n - 1) / n)


def count_at(kl: float, most: int) -> int:
  """The n from 1 to `most` whose KL is nearest to `kl`."""
  return min(range(1, most + 1), key=lambda n: abs(divergence(n) - kl))


def weights(n: int, total: int) -> np.ndarray:
  """The probability of each of `total` answers, sorted by reward, to be the best of a random subset of n of them.

  The i-th (from 1) is the best with probability C(i-1, n-1) / C(total, n), since the other n - 1 must come from the
  i - 1 below it. Averages with these weights are unbiased, because they are means over all subsets.
  """
  weight = np.zeros(total)
  # Without computing a binomial, which may be huge. The best answer, i = total, has n / total; the weight of i - 1
  # follows from that of i. Answers below the n-th are never the best of n and keep weight 0.
  weight[-1] = n / total
  for i in range(total - 1, n - 1, -1):
    weight[i - 1] = weight[i] * (i - n + 1) / i
  return weight


def _best(pool: Pool, n: int) -> BestOfN:
  """Expected scores of the best of n."""
  order = np.argsort(pool.reward_PN, axis=1, kind="stable")
  weight = weights(n, pool.reward_PN.shape[1])
  chosen = lambda values: np.take_along_axis(values, order, axis=1) @ weight
  reward_P = chosen(pool.reward_PN)
  gold_P = None if pool.gold_PN is None else chosen(pool.gold_PN)
  return BestOfN(
    n=n,
    kl=divergence(n),
    gold=None if gold_P is None else float(np.mean(gold_P)),
    reward=float(np.mean(reward_P)),
    by_prompt=reward_P if gold_P is None else gold_P,
  )


def curve(pool: Pool, counts: list[int]) -> list[BestOfN]:
  """Expected scores of the best of n answers, chosen by reward, for each n in `counts`."""
  return [_best(pool, n) for n in counts]


def at_kl(pool: Pool, kl: float, judged_PS: np.ndarray) -> BestAtKL:
  """Best-of-n at a policy's KL, beside the policy's own answers.

  Args:
    pool: scores of the PPO initialisation's answers.
    kl: the policy's KL from the PPO initialisation, in nats.
    judged_PS: the judge's scores of S answers of the policy to each of the pool's prompts: gold scores if the pool has
      them, else rewards.
  """
  total = pool.reward_PN.shape[1]
  n = count_at(kl, total)
  best = _best(pool, n)
  judged_PN = pool.reward_PN if pool.gold_PN is None else pool.gold_PN
  order = np.argsort(pool.reward_PN, axis=1, kind="stable")
  sorted_PN = np.take_along_axis(judged_PN, order, axis=1)
  difference_PSN = judged_PS[:, :, None] - sorted_PN[:, None, :]
  wins_PSN = (difference_PSN > 0) + 0.5 * (difference_PSN == 0)
  return BestAtKL(
    n=n,
    kl=best.kl,
    # The nearest n at the end of what was sampled may be far.
    reaches=n < total or divergence(total) >= kl,
    gold=best.gold,
    reward=best.reward,
    wins_P=wins_PSN.mean(axis=1) @ weights(n, total),
  )


def draw(ctx: Context, prompts: list[str], total: int, sample, simulation) -> Pool:
  """Samples the pool and scores it.

  Args:
    ctx: the run.
    prompts: the prompts, each once.
    total: number of answers to each.
    sample: function of a policy's name and prompts that returns `answers.Answers`.
    simulation: the task with a gold score, or None.
  """
  repeated = [prompt for prompt in prompts for _ in range(total)]
  sampled = sample(REFERENCE, repeated)
  scored = answers.from_text(ctx, repeated, sampled.text, sampled.ended_N)
  reward = answers.score(ctx, ctx.model("reward"), policies.load_reward(ctx), scored)
  gold = None
  if simulation is not None:
    gold = np.asarray(simulation.gold_score(repeated, sampled.text)).reshape(-1, total)
  return Pool(reward.reshape(-1, total), gold)


def powers_of_two(total: int) -> list[int]:
  """1, 2, 4 .. up to `total`."""
  return [2**i for i in range(total.bit_length()) if 2**i <= total]
