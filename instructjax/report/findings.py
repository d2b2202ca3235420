"""Computes which of the paper's findings hold in a run, with 95% intervals.

Pure functions of what evaluation measured: whether a finding holds is never set by hand. Called by stages/evaluate.py
and by page.py, which shows the findings.
"""

import numpy as np

from instructjax.report.results import Measured, Results

# The bounds behind `holds`. They are this project's choice: the paper does not say how near is near enough.
MAX_KL = 12.0  # nats per answer: the KL penalty counts as bounding the KL if it stays below
# PPO and PPO-ptx count as equally good if their rewards are so close, in standard deviations of the reward model.
REWARD_GAP = 0.35
# The reward model's accuracy may be so far below the labelers' agreement with each other.
AGREEMENT_GAP = 0.06
HELDOUT_GAP = 0.04  # accuracy on held-out labelers may be so far below that on training labelers
TOPIC_GAIN = 0.15  # PPO-ptx must name the topic in so many more answers than SFT, as a share of all


def _interval(values_P: np.ndarray, bootstrap: int, rng) -> tuple[float, list[float]]:
  """(mean, 95% percentile interval) of per-prompt values by bootstrap, which resamples prompts.

  Answers to one prompt are alike, so they are not independent samples. Callers first average over a prompt's answers,
  and the interval says how the mean would vary with other prompts.
  """
  # scipy.stats.bootstrap gives the same digits from the same seed (the tests compare with it). Here and below it would
  # replace two lines, take 1.2 to 1.5 times as long (256 and 512 prompts, scipy 1.17), cost over a second to import,
  # and refuse a run with a single prompt.
  index = rng.integers(len(values_P), size=(bootstrap, len(values_P)))
  low, high = np.percentile(values_P[index].mean(axis=1), [2.5, 97.5])
  return float(values_P.mean()), [float(low), float(high)]


def mean_of(values, samples_per_prompt: int, bootstrap: int, rng) -> tuple[float, list[float]]:
  """(mean, 95% interval) of a measurement of all answers, those to a prompt in a row, by bootstrap over prompts."""
  per_prompt = np.asarray(values, float).reshape(-1, samples_per_prompt).mean(axis=1)
  return _interval(per_prompt, bootstrap, rng)


def judged(measured: Measured) -> np.ndarray:
  """The scores that decide between two answers: the gold score if there is one, else the reward model's."""
  return measured.reward if measured.gold is None else measured.gold


def win_rate(
  a: Measured, b: Measured, samples_per_prompt: int, bootstrap: int, rng
) -> tuple[float, list[float]]:
  """How often policy a's answer to a prompt is judged better than b's, as (rate, 95% interval).

  Args:
    a, b: answers of two policies to the same prompts, in the same order.
    samples_per_prompt: answers to each prompt, which stand in a row.
    bootstrap: number of resamples of the prompts.
    rng: NumPy generator for the resampling.
  """
  difference = judged(a) - judged(b)
  # A tie is half a win for each: the rates of a over b and of b over a add up to 1, and equal policies get 0.5.
  wins = (difference > 0) + 0.5 * (difference == 0)
  return _interval(wins.reshape(-1, samples_per_prompt).mean(axis=1), bootstrap, rng)


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


def loss_difference(rows_a, rows_b, bootstrap: int, rng) -> tuple[float, list[float]]:
  """The difference of two policies' mean loss per token, a minus b, as (nats, 95% interval).

  Rows are resampled together for both: they are the same rows of text, so whether a row is hard drops out of the
  difference.

  Args:
    rows_a, rows_b: [rows, 2] as `Results.pretraining` holds them.
    bootstrap: number of resamples of the rows.
    rng: NumPy generator for the resampling.
  """
  rows_a, rows_b = np.asarray(rows_a, float), np.asarray(rows_b, float)
  index = rng.integers(len(rows_a), size=(bootstrap, len(rows_a)))

  def mean(rows, index=slice(None)):
    return rows[index, 0].sum(axis=-1) / rows[index, 1].sum(axis=-1)

  low, high = np.percentile(mean(rows_a, index) - mean(rows_b, index), [2.5, 97.5])
  return float(mean(rows_a) - mean(rows_b)), [float(low), float(high)]


def _finding(id_, claim, paper, measured, interval, holds) -> dict:
  return {
    "id": id_,
    "claim": claim,
    "paper": paper,
    "measured": measured,
    "interval": interval,
    "holds": bool(holds),
  }


def _preferred_over_base(wins):
  # There is no larger base if policy and reward model share one.
  if "ppo_ptx" not in wins or "reward_base" not in wins:
    return None
  zero, few = wins["ppo_ptx"]["reward_base"], wins["ppo_ptx"].get("few_shot")
  measured, intervals = {"zero_shot": zero[0]}, [zero[1]]
  if few:
    measured["few_shot"] = few[0]
    intervals.append(few[1])
  return _finding(
    "preferred_over_base",
    "Answers of the small PPO-ptx policy are preferred to the larger base model's, zero-shot and few-shot.",
    "1.3B InstructGPT is preferred to 175B GPT-3; 175B: 85+-3% over GPT-3, 71+-4% over few-shot GPT-3 (sec 1)",
    measured,
    intervals,
    all(low > 0.5 for low, _ in intervals),  # the whole interval, not only the rate
  )


def _rl_over_sft(wins):
  names = [name for name in ("ppo", "ppo_ptx") if name in wins]
  # A run from a given start of PPO may have no baseline.
  if not names or "sft" not in wins:
    return None
  rates = {name: wins[name]["sft"] for name in names}
  return _finding(
    "rl_over_sft",
    "Answers after PPO, with and without the pretraining mix, are preferred to SFT's.",
    "PPO and PPO-ptx are preferred to SFT at every size; ptx changes preference little (fig. 1)",
    {name: rate[0] for name, rate in rates.items()},
    [rate[1] for rate in rates.values()],
    all(rate[1][0] > 0.5 for rate in rates.values()),
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
  gap = float(np.mean(measured["ppo"].reward) - np.mean(measured["ppo_ptx"].reward))
  gap /= judgement.score_std
  return _finding(
    "alignment_tax",
    "PPO raises the loss on pretraining text above SFT's; the pretraining mix undoes it at about the same reward.",
    "PPO-ptx mitigates the regressions on public NLP data on all datasets (sec 4.2, App. E.6)",
    {
      "ppo_minus_sft": ppo[0],
      "ppo_ptx_minus_sft": ptx[0],
      "ppo_ptx_minus_base": base[0],
      "reward_gap_in_rm_std": gap,
    },
    [ppo[1], ptx[1], base[1]],
    # PPO's loss is certainly above SFT's, PPO-ptx's certainly not, and the mix costs little reward.
    ppo[1][0] > 0 and ptx[1][1] <= 0 and abs(gap) <= REWARD_GAP,
  )


def _reward_model(results):
  rm, agreement = results.reward_model, results.agreement
  if rm.validation is None:
    return None
  accuracy, stderr = rm.validation.accuracy, rm.validation.accuracy_stderr
  measured = {"accuracy": accuracy}
  holds = accuracy - 1.96 * stderr > 0.5  # the lower end of the interval is above chance
  if agreement:
    measured |= {
      "labeler_agreement": agreement.train.agreement,
      "heldout_labelers": rm.heldout_labelers.accuracy,
    }
    holds &= accuracy >= measured["labeler_agreement"] - AGREEMENT_GAP
    holds &= measured["heldout_labelers"] >= accuracy - HELDOUT_GAP
  folds = rm.cross_validation
  if folds:
    measured |= {
      "cross_validation_train": float(np.mean([fold.train for fold in folds])),
      "cross_validation_heldout": float(np.mean([fold.heldout for fold in folds])),
    }
  claim = "The reward model predicts the preferred answer"
  if agreement:
    claim += " about as well as labelers agree, held-out labelers included."
  else:
    claim += " better than chance. (How well labelers agree is not known here.)"
  return _finding(
    "reward_model",
    claim,
    "accuracy 72.4+-0.4% on training and 69.6+-0.9% on held-out labelers; labelers agree 72.6+-1.5% (sec 3.4, 4.1)",
    measured,
    [accuracy - 1.96 * stderr, accuracy + 1.96 * stderr],
    holds,
  )


def _kl_bounded(results, bootstrap, rng):
  samples = results.samples_per_prompt
  kls = {
    name: _interval(m.kl.reshape(-1, samples).mean(axis=1), bootstrap, rng)
    for name, m in results.measured.items()
    if name in ("ppo", "ppo_ptx")
  }
  if not kls:
    return None
  return _finding(
    "kl_bounded",
    f"The KL penalty keeps the policy within {MAX_KL:g} nats of its reference.",
    "a per-token KL penalty from the SFT model mitigates over-optimization (sec 3.5)",
    {name: kl[0] for name, kl in kls.items()},
    [kl[1] for kl in kls.values()],
    all(kl[1][1] <= MAX_KL for kl in kls.values()),
  )


def _overoptimization(results, bootstrap, rng):
  measured, samples = results.measured, results.samples_per_prompt
  pushed = measured.get("ppo_beta0")
  if pushed is None or pushed.gold is None:
    return None
  init = measured["ppo_init"]

  def change(after, before):
    difference = after - before
    return _interval(difference.reshape(-1, samples).mean(axis=1), bootstrap, rng)

  reward, gold = change(pushed.reward, init.reward), change(pushed.gold, init.gold)
  return _finding(
    "overoptimization",
    "Without the KL penalty the reward model's score rises while the true preference falls.",
    "beta = 0 is among the worst settings (E.7); Gao et al. 2022: gold score falls at high KL",
    {
      "reward_change": reward[0],
      "gold_change": gold[0],
      "kl": float(np.mean(pushed.kl)),
    },
    [reward[1], gold[1]],
    reward[1][0] > 0 and gold[1][1] < 0,
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
  gain = named - before
  gained, interval = _interval(gain.reshape(-1, samples).mean(axis=1), bootstrap, rng)
  return _finding(
    "topic_following",
    "More answers do what the prompt asks (name its topic) after PPO-ptx than after SFT.",
    "PPO models more often attempt the correct instruction and satisfy its constraints (fig. 4)",
    {"ppo_ptx_minus_sft": gained, **shares},
    interval,
    gained >= TOPIC_GAIN,
  )


def find(results: Results, *, bootstrap: int, seed: int) -> list[dict]:
  """All findings for which the run has measured what they need.

  Args:
    results: what evaluation measured.
    bootstrap: number of resamples for the 95% intervals.
    seed: seed of the resampling.
  Returns:
    Objects {id, claim, paper, measured, interval, holds}. `interval` is the 95% interval of the first value, or a list
    with one for each of the first values.
  """
  rng = np.random.default_rng(seed)
  wins = win_matrix(results, bootstrap=bootstrap, seed=seed)
  found = [
    _preferred_over_base(wins),
    _rl_over_sft(wins),
    _alignment_tax(results, bootstrap, rng),
    _reward_model(results),
    _kl_bounded(results, bootstrap, rng),
    _overoptimization(results, bootstrap, rng),
    _topic_following(results, bootstrap, rng),
  ]
  found = [finding for finding in found if finding is not None]
  # PPO was trained to please this judge, so a win by its scores proves less than one by a gold score.
  if not results.has_gold:
    for finding in found:
      if finding["id"] in ("preferred_over_base", "rl_over_sft"):
        finding["claim"] += " (Judged by the reward model that PPO was trained on.)"
  return found


def summary(results: Results) -> dict[str, dict[str, float]]:
  """One row per policy for the table at the end of a run: means over its answers, and its pretraining loss."""
  rows = {}
  for name, measured in results.measured.items():
    values = {
      "gold": measured.gold,
      "reward": measured.reward,
      "kl": measured.kl,
      "names_topic": measured.names_topic,
      "length": measured.length,
      "ended": measured.ended,
    }
    rows[name] = {key: float(np.mean(x)) for key, x in values.items() if x is not None}
    if name in results.pretraining:
      nll, weight = np.asarray(results.pretraining[name]).sum(axis=0)
      rows[name]["pretrain_loss"] = float(nll / weight)
  return rows
