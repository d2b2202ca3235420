"""Findings that the paper does not have: what a sceptic would ask of a run before believing the others.

Would an echo of the prompt score as well? Would choosing among samples? Are the answers one phrase, said again? Does it
work on topics that no training prompt is about? Called by findings.py. Pure functions of what evaluation measured.
"""

import numpy as np

from instructjax.report import wording
from instructjax.report.intervals import above, all_of, at_most, mean_interval, mean_of, win_rate
from instructjax.report.results import Results

# Findings that rest on win rates.
JUDGED = ("preferred_over_base", "rl_over_sft", "over_untrained", "over_best_of_n", "new_topics")
# The bounds behind `holds`.
UNTRAINED_WINS = 0.6  # win rate over an answer that needs no training
MAX_REPEATS = 0.1  # so many more of PPO-ptx's answers than of PPO init's may repeat a pair of words, as a share of all
MAX_COPIED = 0.1  # share of an answer's words that are copied from the prompt
MIN_DISTINCT = 0.9  # different answers over answers


def finding(id_, claim, paper, rule, measured, interval, holds) -> dict:
  """A finding as `findings.find` returns it."""
  return {
    "id": id_,
    "claim": claim,
    "paper": paper,
    "rule": rule,
    "measured": measured,
    "interval": interval,
    "holds": holds,
  }


def untrained_wins(
  results: Results, *, bootstrap: int, seed: int
) -> dict[str, tuple[float, list[float]]]:
  """The win rate of PPO-ptx over each of the answers that need no training, as (rate, 95% interval)."""
  # A generator of its own, as in `findings.win_matrix`: the page shows the same digits.
  rng = np.random.default_rng(seed)
  policy = results.measured.get("ppo_ptx")
  if policy is None:
    return {}
  samples = results.samples_per_prompt
  return {
    name: win_rate(policy, other, samples, bootstrap, rng)
    for name, other in results.untrained.items()
  }


def _over_untrained(results, bootstrap, seed):
  wins = untrained_wins(results, bootstrap=bootstrap, seed=seed)
  if not wins:
    return None
  # Demonstrations are written for their prompts: they are shown, and no win over them is claimed.
  blind = [interval for name, (_, interval) in wins.items() if name != "demonstrations"]
  return finding(
    "over_untrained",
    "PPO-ptx's answers are preferred to answers that need no training: an echo of the prompt, one training line for all"
    " prompts, training lines drawn at random.",
    "not in the paper. A score that an echo can win would say nothing",
    f"the interval of each win rate lies above {UNTRAINED_WINS:.0%}; test demonstrations are shown and do not count",
    {name: rate for name, (rate, _) in wins.items()},
    [interval for _, interval in wins.values()],
    all_of(*(above(interval, UNTRAINED_WINS) for interval in blind)),
  )


def _over_best_of_n(results, bootstrap, rng):
  best = results.best_at_kl.get("ppo_ptx")
  if best is None:
    return None
  rate, interval = mean_interval(best.wins_P, bootstrap, rng)
  short = "" if best.reaches else ", all that were drawn, which is less KL than the policy's"
  return finding(
    "over_best_of_n",
    f"At the same KL, PPO-ptx's answers are preferred to the best of n = {best.n} answers of PPO init{short}.",
    "not in the paper. WebGPT (Nakano et al. 2021) found best-of-n as good as RL",
    "the interval of the win rate lies above 50%",
    {
      "ppo_ptx": rate,
      "best_of_n_kl": best.kl,
      "kl": float(np.mean(results.measured["ppo_ptx"].kl)),
    },
    [interval],
    above(interval, 0.5),
  )


def _own_words(results, bootstrap, rng):
  after, before = (results.measured.get(name) for name in ("ppo_ptx", "ppo_init"))
  if after is None or before is None:
    return None
  samples = results.samples_per_prompt
  mean = lambda values_N: mean_of(values_N, samples, bootstrap, rng)
  more = mean(np.asarray(after.repeats, float) - before.repeats)
  copied = mean(after.copied)
  distinct = wording.distinct(after.answer)
  measured = {"more_repeats": more[0], "copied": copied[0], "distinct": distinct}
  measured |= {
    f"repeats_{n}": float(np.mean(m.repeats)) for n, m in (("ppo_init", before), ("ppo_ptx", after))
  }
  if after.topic_again is not None:
    measured["topic_again"] = float(np.mean(after.topic_again))
  return finding(
    "own_words",
    "PPO-ptx has not learned to please by repetition, by copying the prompt or by one answer for all prompts.",
    "not in the paper",
    f"at most {MAX_REPEATS:.0%} more of its answers than of PPO init's repeat a pair of words, at most {MAX_COPIED:.0%}"
    f" of its words are copied in runs of {wording.COPIED_RUN} or more (each with its interval), and at least"
    f" {MIN_DISTINCT:.0%} of its answers differ",
    measured,
    [more[1], copied[1]],
    all_of(at_most(more[1], MAX_REPEATS), at_most(copied[1], MAX_COPIED), distinct >= MIN_DISTINCT),
  )


def _new_topics(results, bootstrap, rng):
  found, samples = results.new_topics, results.samples_per_prompt
  if not {"ppo_ptx", "sft"} <= set(found):
    return None
  rate, interval = win_rate(found["ppo_ptx"], found["sft"], samples, bootstrap, rng)
  measured = {"ppo_ptx_over_sft": rate}
  measured |= {
    f"names_topic_{name}": float(np.mean(found[name].names_topic)) for name in ("sft", "ppo_ptx")
  }
  claim = (
    "On topics that no training prompt is about, PPO-ptx's answers are still preferred to SFT's."
  )
  # A win need not mean that it has learned to take the topic from the prompt.
  claim += f" (It names {measured['names_topic_ppo_ptx']:.0%} of these topics"
  seen = results.measured.get("ppo_ptx")
  if seen is not None and seen.names_topic is not None:
    claim += f", and {np.mean(seen.names_topic):.0%} of those seen in training"
  claim += ".)"
  return finding(
    "new_topics",
    claim,
    "the paper holds out prompts and users, not topics",
    "the interval of the win rate lies above 50%",
    measured,
    [interval],
    above(interval, 0.5),
  )


def find(results: Results, *, bootstrap: int, seed: int) -> list[dict | None]:
  """The findings, as `findings.find` does; None for one that the run has not measured what it needs for."""
  rng = np.random.default_rng(seed)
  return [
    _over_untrained(results, bootstrap, seed),
    _over_best_of_n(results, bootstrap, rng),
    _own_words(results, bootstrap, rng),
    _new_topics(results, bootstrap, rng),
  ]
