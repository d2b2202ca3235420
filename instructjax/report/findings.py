"""Computes which of the paper's findings hold in a run, with 95% intervals.

Pure functions of what evaluation measured: whether a finding holds is never set by hand. It can also be that it cannot
be told: an interval reaches over the threshold. Called by stages/evaluate.py and by page.py, which shows the findings.
doubts.py has those that the paper does not have.
"""

import numpy as np

from instructjax.report import doubts, wording
from instructjax.report.intervals import (
  above,
  all_of,
  at_least,
  at_most,
  below,
  loss_difference,
  mean_of,
  win_rate,
)
from instructjax.report.results import Measured, Results

# The bounds behind `holds`. They are this project's choice: the paper does not say how near is near enough.
MAX_KL = 12.0  # nats per answer: the KL penalty counts as bounding the KL if it stays below
# PPO and PPO-ptx count as equally good if their rewards are so close, in standard deviations of the reward model.
REWARD_GAP = 0.35
# The reward model's accuracy may be so far below the labelers' agreement with each other.
AGREEMENT_GAP = 0.06
HELDOUT_GAP = 0.04  # accuracy on held-out labelers may be so far below that on training labelers
TOPIC_GAIN = 0.15  # PPO-ptx must name the topic in so many more answers than SFT, as a share of all


def win_matrix(
  results: Results, *, bootstrap: int, seed: int
) -> dict[str, dict[str, tuple[float, list[float]]]]:
  """The win rate of every policy over every other: row's policy -> column's policy -> (rate, 95% interval)."""
  # A generator of its own: the findings and the page each compute this matrix, and must show the same digits.
  rng = np.random.default_rng(seed)
  measured, samples = results.measured, results.samples_per_prompt
  return {
    a: {b: win_rate(measured[a], measured[b], samples, bootstrap, rng) for b in measured if b != a}
    for a in measured
  }


def _preferred_over_base(results, wins):
  # There is no larger base if policy and reward model share one.
  if "ppo_ptx" not in wins or "reward_base" not in wins:
    return None
  zero, few = wins["ppo_ptx"]["reward_base"], wins["ppo_ptx"].get("few_shot")
  measured, intervals = {"zero_shot": zero[0]}, [zero[1]]
  if few:
    measured["few_shot"] = few[0]
    intervals.append(few[1])
  loss = {name: loss_per_token(results.pretraining[name]) for name in results.pretraining}
  claim = "Answers of the small PPO-ptx policy are preferred to the larger base model's"
  claim += ", zero-shot and few-shot." if few else "."
  if {"base", "reward_base"} <= set(loss):
    # How much larger the larger base is in effect.
    measured |= {"larger_base_loss": loss["reward_base"], "base_loss": loss["base"]}
    gap = loss["base"] - loss["reward_base"]
    claim += f" (Its loss on held-out text is {abs(gap):.2f} nats a token"
    claim += f" {'lower' if gap > 0 else 'higher'} than the small base's.)"
  return doubts.finding(
    "preferred_over_base",
    claim,
    "1.3B InstructGPT is preferred to 175B GPT-3; 175B: 85+-3% over GPT-3, 71+-4% over few-shot GPT-3 (sec 1)",
    "the interval of each win rate lies above 50%",
    measured,
    intervals,
    all_of(*(above(interval, 0.5) for interval in intervals)),
  )


def _rl_over_sft(wins):
  names = [name for name in ("ppo", "ppo_ptx") if name in wins]
  # A run from a given start of PPO may have no baseline.
  if not names or "sft" not in wins:
    return None
  rates = {name: wins[name]["sft"] for name in names}
  return doubts.finding(
    "rl_over_sft",
    "Answers after PPO, with and without the pretraining mix, are preferred to SFT's.",
    "PPO and PPO-ptx are preferred to SFT at every size; ptx changes preference little (fig. 1)",
    "the interval of each win rate lies above 50%",
    {name: rate[0] for name, rate in rates.items()},
    [rate[1] for rate in rates.values()],
    all_of(*(above(rate[1], 0.5) for rate in rates.values())),
  )


def _alignment_tax(results, bootstrap, rng):
  rows, measured, judgement = results.pretraining, results.measured, results.reward_model.validation
  # Where weights or a reward model were given, the run may have no base or baseline, or no rankings.
  if not {"ppo", "ppo_ptx", "sft", "base"} <= set(rows) or judgement is None:
    return None
  ppo = loss_difference(rows["ppo"], rows["sft"], bootstrap, rng)
  ptx = loss_difference(rows["ppo_ptx"], rows["sft"], bootstrap, rng)
  base = loss_difference(rows["ppo_ptx"], rows["base"], bootstrap, rng)
  # In standard deviations, because a reward model's scores have no scale of their own.
  gap_N = (np.asarray(measured["ppo"].reward) - measured["ppo_ptx"].reward) / judgement.score_std
  gap = mean_of(gap_N, results.samples_per_prompt, bootstrap, rng)
  return doubts.finding(
    "alignment_tax",
    "PPO raises the loss on pretraining text above SFT's; the pretraining mix undoes it at about the same reward.",
    "PPO-ptx mitigates the regressions on public NLP data on all datasets (sec 4.2, App. E.6)",
    "PPO - SFT lies above 0 nats a token, PPO-ptx - SFT not above 0, and the reward gap (PPO - PPO-ptx) within"
    f" +-{REWARD_GAP:g} standard deviations of the reward model, each with its interval",
    {
      "ppo_minus_sft": ppo[0],
      "ppo_ptx_minus_sft": ptx[0],
      "ppo_ptx_minus_base": base[0],
      "reward_gap_in_rm_std": gap[0],
    },
    [ppo[1], ptx[1], base[1], gap[1]],
    # PPO's loss is certainly above SFT's, PPO-ptx's certainly not, and the mix costs little reward.
    all_of(
      above(ppo[1], 0.0),
      at_most(ptx[1], 0.0),
      at_most(gap[1], REWARD_GAP),
      at_least(gap[1], -REWARD_GAP),
    ),
  )


def _around(value: float, *errors: float) -> list[float]:
  """The 95% interval of a number, or of a difference, with these standard errors."""
  half = 1.96 * float(np.sqrt(sum(error**2 for error in errors)))
  return [value - half, value + half]


def _reward_model(results):
  rm, agreement = results.reward_model, results.agreement
  if rm.validation is None:
    return None
  accuracy, stderr = rm.validation.accuracy, rm.validation.accuracy_stderr
  measured, intervals = {"accuracy": accuracy}, [_around(accuracy, stderr)]
  holds = above(intervals[0], 0.5)
  claim, rule = "The reward model predicts the preferred answer", "accuracy lies above 50%"
  if agreement:
    between, heldout = agreement.train, rm.heldout_labelers
    measured |= {"labeler_agreement": between.agreement, "heldout_labelers": heldout.accuracy}
    intervals += [
      _around(between.agreement, between.agreement_stderr),
      _around(heldout.accuracy, heldout.accuracy_stderr),
    ]
    to_agreement = _around(accuracy - between.agreement, stderr, between.agreement_stderr)
    to_heldout = _around(heldout.accuracy - accuracy, stderr, heldout.accuracy_stderr)
    holds = all_of(
      holds, at_least(to_agreement, -AGREEMENT_GAP), at_least(to_heldout, -HELDOUT_GAP)
    )
    claim += " about as well as labelers agree, held-out labelers included."
    rule += (
      f", at most {AGREEMENT_GAP:.0%} below the labelers' agreement, and on held-out labelers at most {HELDOUT_GAP:.0%}"
      " below itself, each with the interval of the difference"
    )
  else:
    claim += " better than chance. (How well labelers agree is not known here.)"
  folds = rm.cross_validation
  if folds:
    measured |= {
      "cross_validation_train": float(np.mean([fold.train for fold in folds])),
      "cross_validation_heldout": float(np.mean([fold.heldout for fold in folds])),
    }
  return doubts.finding(
    "reward_model",
    claim,
    "accuracy 72.4+-0.4% on training and 69.6+-0.9% on held-out labelers; labelers agree 72.6+-1.5% (sec 3.4, 4.1)",
    rule,
    measured,
    intervals,
    holds,
  )


def _kl_bounded(results, bootstrap, rng):
  samples = results.samples_per_prompt
  kls = {
    name: mean_of(m.kl, samples, bootstrap, rng)
    for name, m in results.measured.items()
    if name in ("ppo", "ppo_ptx")
  }
  if not kls:
    return None
  return doubts.finding(
    "kl_bounded",
    f"The KL penalty keeps the policy within {MAX_KL:g} nats of its reference.",
    "a per-token KL penalty from the SFT model mitigates over-optimization (sec 3.5)",
    f"the interval of each policy's KL lies below {MAX_KL:g} nats an answer",
    {name: kl[0] for name, kl in kls.items()},
    [kl[1] for kl in kls.values()],
    all_of(*(at_most(kl[1], MAX_KL) for kl in kls.values())),
  )


def _overoptimization(results, bootstrap, rng):
  measured, samples = results.measured, results.samples_per_prompt
  pushed = measured.get("ppo_beta0")
  if pushed is None or pushed.gold is None:
    return None
  init = measured["ppo_init"]
  change = lambda after, before: mean_of(after - before, samples, bootstrap, rng)
  reward, gold = change(pushed.reward, init.reward), change(pushed.gold, init.gold)
  return doubts.finding(
    "overoptimization",
    "Without the KL penalty the reward model's score rises while the true preference falls.",
    "beta = 0 is among the worst settings (E.7); Gao et al. 2022: gold score falls at high KL",
    "at beta = 0 the interval of the reward model's change lies above 0, and that of the gold score's below 0",
    {
      "reward_change": reward[0],
      "gold_change": gold[0],
      "kl": float(np.mean(pushed.kl)),
    },
    [reward[1], gold[1]],
    all_of(above(reward[1], 0.0), below(gold[1], 0.0)),
  )


def _topic_following(results, bootstrap, rng):
  measured, samples = results.measured, results.samples_per_prompt
  if not {"ppo_ptx", "sft"} <= set(measured) or measured["ppo_ptx"].names_topic is None:
    return None
  shares = {
    name: float(np.mean(measured[name].names_topic))
    for name in ("sft", "ppo", "ppo_ptx")
    if name in measured
  }
  named, before = (np.asarray(measured[name].names_topic, float) for name in ("ppo_ptx", "sft"))
  gained, interval = mean_of(named - before, samples, bootstrap, rng)
  return doubts.finding(
    "topic_following",
    "More answers do what the prompt asks (name its topic) after PPO-ptx than after SFT.",
    "PPO models more often attempt the correct instruction and satisfy its constraints (fig. 4)",
    f"the interval of the gain lies above {TOPIC_GAIN:.0%} of the answers",
    {"ppo_ptx_minus_sft": gained, **shares},
    [interval],
    at_least(interval, TOPIC_GAIN),
  )


def find(results: Results, *, bootstrap: int, seed: int) -> list[dict]:
  """All findings for which the run has measured what they need: the paper's first, then those of doubts.py.

  Args:
    results: what evaluation measured.
    bootstrap: number of resamples for the 95% intervals.
    seed: seed of the resampling.
  Returns:
    Objects {id, claim, paper, rule, measured, interval, holds}. `interval` has the 95% intervals of the first values,
    `rule` says when it holds, and `holds` is None if that cannot be told.
  """
  rng = np.random.default_rng(seed)
  wins = win_matrix(results, bootstrap=bootstrap, seed=seed)
  found = [
    _preferred_over_base(results, wins),
    _rl_over_sft(wins),
    _alignment_tax(results, bootstrap, rng),
    _reward_model(results),
    _kl_bounded(results, bootstrap, rng),
    _overoptimization(results, bootstrap, rng),
    _topic_following(results, bootstrap, rng),
    *doubts.find(results, bootstrap=bootstrap, seed=seed),
  ]
  found = [finding for finding in found if finding is not None]
  # PPO was trained to please this judge, so a win by its scores proves less than one by a gold score.
  if not results.has_gold:
    for finding in found:
      if finding["id"] in doubts.JUDGED:
        finding["claim"] += " (Judged by the reward model that PPO was trained on.)"
  return found


def loss_per_token(rows) -> float:
  """The mean loss in nats of rows as `Results.pretraining` holds them."""
  nll, weight = np.asarray(rows).sum(axis=0)
  return float(nll / weight)


def _means(measured: Measured) -> dict[str, float]:
  values = {
    "gold": measured.gold,
    "reward": measured.reward,
    "kl": measured.kl,
    "names_topic": measured.names_topic,
    "topic_again": measured.topic_again,
    "repeats": measured.repeats,
    "copied": measured.copied,
    "length": measured.length,
    "ended": measured.ended,
  }
  means = {key: float(np.mean(x)) for key, x in values.items() if x is not None}
  return means | {"distinct": wording.distinct(measured.answer)}


def summary(results: Results) -> dict[str, dict[str, float]]:
  """One row per policy for the table at the end of a run: means over its answers, and its pretraining loss.

  The answers that need no training follow the policies, and then best-of-n at the policies' KL.
  """
  rows = {name: _means(measured) for name, measured in results.measured.items()}
  for name in set(rows) & set(results.pretraining):
    rows[name]["pretrain_loss"] = loss_per_token(results.pretraining[name])
  rows |= {name: _means(measured) for name, measured in results.untrained.items()}
  for name, best in results.best_at_kl.items():
    row = {"gold": best.gold, "reward": best.reward, "kl": best.kl, "n": float(best.n)}
    rows[f"best_of_n/{name}"] = {key: value for key, value in row.items() if value is not None}
  return rows
