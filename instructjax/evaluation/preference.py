"""Who is preferred to whom, with ties, intervals over prompts, and what length alone explains.

Called by preference_command.py. Pure functions of verdicts and answers; judges are elsewhere.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.evaluation.resampling import Share, numbers_of, share
from instructjax.report import wording

_RIDGE = 1e-2  # of the length-controlled model, so that judges who always prefer the longer answer have a fit
_STEPS = 20  # of Newton's method, which takes six or so
_SMALL = 1e-7  # a step that ends it
_FREQUENT = 10  # words whose share of all words is given


@dataclasses.dataclass(frozen=True)
class Answers:
  """What each policy answered, in the same order of prompts.

  Attributes:
    prompt_N: the prompts; one that was asked several times is there as often.
    answers: policy -> its answers.
  """

  prompt_N: Sequence[str]
  answers: Mapping[str, Sequence[str]]


def outcomes(score_a_N: np.ndarray, score_b_N: np.ndarray) -> np.ndarray:
  """1 where a's answer has the higher score, 0 where b's has, a half where they are equal; NaN where one has none."""
  difference_N = np.asarray(score_a_N, float) - np.asarray(score_b_N, float)
  return 0.5 * (1 + np.sign(difference_N))


def length_term(answers_a: Sequence[str], answers_b: Sequence[str]) -> np.ndarray:
  """AlpacaEval 2's length term of each pair: tanh of the difference in characters over its standard deviation."""
  count = lambda texts: np.array([len(text) for text in texts], float)
  difference_N = count(answers_a) - count(answers_b)
  spread = float(np.std(difference_N))
  return np.tanh(difference_N / spread) if spread else np.zeros(len(difference_N))


def fit_length(outcome_N: np.ndarray, term_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
  """[B, 2]: (theta, phi) of P(a is preferred) = sigmoid(theta + phi * term), by weighted logistic regression.

  Ties are outcomes of a half. A small ridge on both keeps them finite.
  """
  beta_B2 = np.zeros((len(weight_BN), 2))
  powers_N2 = np.stack([np.ones_like(term_N), term_N], axis=1)
  squares_N3 = np.stack([np.ones_like(term_N), term_N, term_N**2], axis=1)
  for _ in range(_STEPS):
    p_BN = 1 / (1 + np.exp(-np.clip(beta_B2 @ powers_N2.T, -30, 30)))
    slope_B2 = (weight_BN * (outcome_N - p_BN)) @ powers_N2 - _RIDGE * beta_B2
    c0_B, c1_B, c2_B = ((weight_BN * p_BN * (1 - p_BN)) @ squares_N3).T
    c0_B, c2_B = c0_B + _RIDGE, c2_B + _RIDGE
    determinant_B = c0_B * c2_B - c1_B**2
    step_2B = (
      (c2_B * slope_B2[:, 0] - c1_B * slope_B2[:, 1]) / determinant_B,
      (c0_B * slope_B2[:, 1] - c1_B * slope_B2[:, 0]) / determinant_B,
    )
    beta_B2 = beta_B2 + np.stack(step_2B, axis=1)
    if max(map(np.max, map(np.abs, step_2B))) < _SMALL:
      break
  return beta_B2


def compare(
  outcome_N: np.ndarray,
  term_N: np.ndarray,
  prompt_N: np.ndarray,
  *,
  bootstrap: int,
  seed: int,
) -> dict[str, Any] | None:
  """How often a is preferred to b, plainly and at equal length; intervals resample prompts.

  Args:
    outcome_N: see `outcomes`; NaN where nobody judged.
    term_N: see `length_term`.
    prompt_N: number of the prompt.
    bootstrap, seed: of the resampling.
  Returns:
    None if nothing was judged. Else judged: how many pairs; win_rate: with ties counting half; wins, ties, losses:
    shares; longer: how often a's answer is the longer one, equal lengths counting half. length_controlled: the fitted
    rate at equal length, as AlpacaEval 2 (arXiv:2404.04475), but without its term for the difficulty of a prompt, which
    takes many models. length_alone: the fitted rate of a judge with the same taste for length and no other, at the
    lengths at hand. explained: the share of the win rate's distance from a half that this is; None if that distance is
    within its interval. Rates are (value, interval).
  """
  known_N = np.isfinite(outcome_N)
  if not known_N.any():
    return None
  outcome_N, term_N = outcome_N[known_N], term_N[known_N]
  _, place_N = np.unique(prompt_N[known_N], return_inverse=True)
  count = int(place_N.max()) + 1
  rng = np.random.default_rng(seed)
  drawn_BP = rng.multinomial(count, np.full(count, 1 / count), size=bootstrap).astype(float)
  weight_BN = np.concatenate([np.ones((1, len(outcome_N))), drawn_BP[:, place_N]])
  total_B = weight_BN.sum(axis=1)
  mean = lambda values_N: (weight_BN @ values_N) / total_B
  beta_B2 = fit_length(outcome_N, term_N, weight_BN)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  alone_BN = sigmoid(beta_B2[:, 1:] * term_N)
  alone_B = (weight_BN * alone_BN).sum(axis=1) / total_B
  win = _with_interval(mean(outcome_N))
  is_told = not win[1][0] <= 0.5 <= win[1][1]
  return {
    "judged": len(outcome_N),
    "win_rate": win,
    "wins": float(np.mean(outcome_N > 0.5)),
    "ties": float(np.mean(outcome_N == 0.5)),
    "losses": float(np.mean(outcome_N < 0.5)),
    "longer": _with_interval(mean(0.5 * (1 + np.sign(term_N)))),
    "length_controlled": _with_interval(sigmoid(beta_B2[:, 0])),
    "length_alone": _with_interval(alone_B),
    "explained": float((alone_B[0] - 0.5) / (win[0] - 0.5)) if is_told else None,
  }


def _with_interval(values_B: np.ndarray) -> Share:
  """The value of all prompts, which comes first, and the 95% interval of the resamples after it."""
  low, high = np.percentile(values_B[1:], [2.5, 97.5])
  return float(values_B[0]), [float(low), float(high)]


def every_pair(
  found: Answers,
  verdicts: Mapping[tuple[str, str], np.ndarray],
  *,
  bootstrap: int,
  seed: int,
) -> dict[str, dict[str, Any]]:
  """Policy -> policy -> `compare`, for each pair that was judged, from both sides.

  Args:
    found: the answers.
    verdicts: (a, b) -> outcomes, one side of each pair.
    bootstrap, seed: of the resampling.
  """
  prompt_N = numbers_of(found.prompt_N)
  result: dict[str, dict[str, Any]] = {name: {} for name in found.answers}
  for (a, b), outcome_N in verdicts.items():
    term_N = length_term(found.answers[a], found.answers[b])
    row = compare(outcome_N, term_N, prompt_N, bootstrap=bootstrap, seed=seed)
    if row:
      result[a][b], result[b][a] = row, _mirrored(row)
  return result


def _mirrored(row: Mapping[str, Any]) -> dict[str, Any]:
  """The comparison of b with a, from that of a with b."""
  rates = ("win_rate", "longer", "length_controlled", "length_alone")
  turned = {key: (1 - row[key][0], [1 - row[key][1][1], 1 - row[key][1][0]]) for key in rates}
  return {**row, **turned, "wins": row["losses"], "losses": row["wins"]}


def from_scores(scores: Mapping[str, Sequence[float]]) -> dict[tuple[str, str], np.ndarray]:
  """The outcomes of all pairs of policies, from a score of each answer."""
  return {
    (a, b): outcomes(np.array(scores[a]), np.array(scores[b]))
    for a, b in itertools.combinations(scores, 2)
  }


def from_rankings(
  found: Answers, rankings: Sequence[tuple[str, Sequence[str], Sequence[int]]]
) -> tuple[dict[tuple[str, str], np.ndarray], int]:
  """The outcomes of all pairs of policies from what people ranked; several labelers of one pair are averaged.

  Args:
    found: the answers.
    rankings: (prompt, answers, ranks), the answers in any order. An answer belongs to each policy that gave it.
  Returns:
    (outcomes, NaN where nobody ranked both; number of rankings that rank no two policies).
  """
  places = collections.defaultdict(list)
  for index, prompt in enumerate(found.prompt_N):
    places[prompt].append(index)
  total = {
    pair: np.zeros((2, len(found.prompt_N))) for pair in itertools.combinations(found.answers, 2)
  }
  unused = 0
  for prompt, answers, ranks in rankings:
    rank_of = dict(zip(answers, ranks))
    is_used = False
    for index in places.get(prompt, ()):
      given = {
        name: texts[index] for name, texts in found.answers.items() if texts[index] in rank_of
      }
      for a, b in itertools.combinations(given, 2):
        if given[a] != given[b]:
          difference = rank_of[given[b]] - rank_of[given[a]]
          total[a, b][:, index] += (0.5 * (1 + np.sign(difference)), 1)
          is_used = True
    unused += not is_used
  with np.errstate(invalid="ignore", divide="ignore"):
    return {pair: wins / counts for pair, (wins, counts) in total.items()}, unused


def habits(found: Answers, baseline: str) -> dict[str, dict[str, Any]]:
  """What a reader notices in each policy's answers before any score does.

  Returns:
    policy -> repeats: share of answers that have a pair of words twice; copied: mean share of words that stand in a run
    of three or more of the prompt; distinct: different answers over all; words: mean number; frequent: share of all
    words that the ten most frequent are, None where there are no words; spam: (word, share of answers that have it, the
    same share of the baseline's answers), for the word whose share has grown most beyond its share of the prompts.
  """
  base = _shares(found.answers[baseline])
  asked = _shares(found.prompt_N)
  result = {}
  for name, answers in found.answers.items():
    counts = collections.Counter(word for answer in answers for word in wording.words(answer))
    total = sum(counts.values())
    shares = _shares(answers)
    grown = lambda word, shares=shares: shares[word] - max(base.get(word, 0), asked.get(word, 0))
    word = max(sorted(shares), key=grown, default="")
    frequent = sum(number for _, number in counts.most_common(_FREQUENT))
    result[name] = {
      "repeats": float(np.mean([wording.repeats_pair(answer) for answer in answers])),
      "copied": float(np.mean([wording.copied(*pair) for pair in zip(found.prompt_N, answers)])),
      "distinct": wording.distinct(answers),
      "words": total / len(answers),
      "frequent": frequent / total if total else None,
      "spam": (word, shares.get(word, 0.0), base.get(word, 0.0)),
    }
  return result


def _shares(texts: Sequence[str]) -> dict[str, float]:
  """Word -> share of the texts that have it."""
  counts = collections.Counter(word for text in texts for word in set(wording.words(text)))
  return {word: count / len(texts) for word, count in counts.items()}


def metadata(
  rows: Sequence[tuple[str, str, Mapping[str, float]]], *, bootstrap: int, seed: int
) -> dict[str, dict[str, Share]]:
  """Means of what labelers noted of answers: Likert scores, and the rates of the paper's table 3.

  Args:
    rows: (prompt, policy, name -> number; 1 and 0 for yes and no).
    bootstrap, seed: of the intervals over prompts.
  Returns:
    policy -> name -> (mean, interval).
  """
  columns: dict[tuple[str, str], list[tuple[str, float]]] = collections.defaultdict(list)
  for prompt, policy, notes in rows:
    for name, value in notes.items():
      columns[policy, name].append((prompt, float(value)))
  result: dict[str, dict[str, Share]] = collections.defaultdict(dict)
  for (policy, name), values in columns.items():
    rng = np.random.default_rng(seed)
    prompt_N = numbers_of(prompt for prompt, _ in values)
    found = share(np.array([value for _, value in values]), prompt_N, bootstrap, rng)
    if found:
      result[policy][name] = found
  return dict(result)
