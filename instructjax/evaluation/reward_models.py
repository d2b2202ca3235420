"""How good a reward model is on ranked answers, with intervals: accuracy, calibration, length, best-of-4 and ties.

Called by rewards_command.py. Pure functions of rankings and scores; what reads and runs models is elsewhere. Intervals
are bootstraps over prompts, because the pairs of a prompt are not independent.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.evaluation.resampling import numbers_of, share
from instructjax.ops import preference

_BINS = 10
SIMILAR = 1.1  # two answers are of like length if the longer has at most so many times the words of the shorter


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt's answers as one labeler ranked them, and as a reward model scores them.

  Attributes:
    prompt: text by which prompts are told apart.
    answers: the answers.
    ranks: 1 is best; equal ranks are ties.
    scores: the reward model's.
    labeler: who ranked them; None if unknown.
  """

  prompt: str
  answers: Sequence[str]
  ranks: Sequence[int]
  scores: Sequence[float]
  labeler: str | None = None


@dataclasses.dataclass(frozen=True)
class Pairs:
  """All pairs that a labeler does not call a tie, one entry a pair.

  Attributes:
    prompt_N: number of the prompt.
    margin_N: score of the labeler's choice minus that of the other.
    longer_N: how much longer the labeler's choice is, in words; negative if it is shorter.
    alike_N: whether both are of like length, see `SIMILAR`.
  """

  prompt_N: np.ndarray
  margin_N: np.ndarray
  longer_N: np.ndarray
  alike_N: np.ndarray

  def take(self, kept_N: np.ndarray) -> "Pairs":
    return Pairs(*(getattr(self, field.name)[kept_N] for field in dataclasses.fields(self)))


def pairs_of(items: Sequence[Item]) -> Pairs:
  """The untied pairs of all items."""
  rows = []
  for prompt, item in zip(numbers_of(item.prompt for item in items), items, strict=True):
    words = [len(answer.split()) for answer in item.answers]
    for i, j in itertools.permutations(range(len(item.ranks)), 2):
      if item.ranks[i] < item.ranks[j]:
        short, long = sorted((words[i], words[j]))
        rows.append(
          (prompt, item.scores[i] - item.scores[j], words[i] - words[j], long <= SIMILAR * short)
        )
  columns = list(zip(*rows)) or [(), (), (), ()]
  return Pairs(
    np.array(columns[0], int),
    np.array(columns[1], float),
    np.array(columns[2], int),
    np.array(columns[3], bool),
  )


def right(difference_N: np.ndarray) -> np.ndarray:
  """1 where a difference is in favour of the labeler's choice, 0 where not, and a half for none at all."""
  return 0.5 * (1 + np.sign(difference_N))


def row(items: Sequence[Item], *, bootstrap: int, seed: int) -> dict[str, Any]:
  """What is measured of a reward model on some items.

  Returns:
    pairs, prompts: how many; ties: share of all pairs that the labelers tie. accuracy: share of untied pairs in the
    labeler's order, equal scores counting half. longer_wins: how often the longer answer is the labeler's choice, which
    is the accuracy of a scorer that counts words; follows_length: how often the longer one has the higher score.
    length_matched: accuracy on pairs of like length; shorter_wins: on pairs whose shorter answer is the choice.
    expected_error: of calibration; log_loss: mean of -log sigmoid(margin), in nats. reliability: rows of (confidence,
    accuracy, count). Shares are (value, interval), or None where there is no pair.
  """
  rng = np.random.default_rng(seed)
  found = pairs_of(items)
  mean = lambda values, kept: share(values[kept], found.prompt_N[kept], bootstrap, rng)
  every, differ = np.ones(len(found.margin_N), bool), found.longer_N != 0
  correct = right(found.margin_N)
  num_all = sum(len(item.ranks) * (len(item.ranks) - 1) // 2 for item in items)
  result: dict[str, Any] = {
    "pairs": len(correct),
    "prompts": len(np.unique(found.prompt_N)),
    "ties": 1 - len(correct) / num_all if num_all else 0.0,
    "accuracy": mean(correct, every),
    "longer_wins": mean(right(found.longer_N), differ),
    "follows_length": mean(right(found.margin_N * np.sign(found.longer_N)), differ),
    "length_matched": mean(correct, found.alike_N),
    "shorter_wins": mean(correct, found.longer_N < 0),
    "num_length_matched": int(found.alike_N.sum()),
  }
  if len(correct):
    calibration = preference.calibration(found.margin_N, num_bins=_BINS)
    bins = zip(calibration.confidence, calibration.accuracy, calibration.count)
    result |= {
      "expected_error": calibration.expected_error,
      "log_loss": float(np.logaddexp(0, -found.margin_N).mean()),
      "reliability": [(float(p), float(a), int(n)) for p, a, n in bins if n],
    }
  return result


def table(items: Sequence[Item], *, bootstrap: int, seed: int) -> dict[str, Any]:
  """Everything that is measured of a reward model: `row` of all items and by labeler, and the tests below.

  Returns:
    {'all': row, 'labelers': name -> row, only where labelers are named, 'agreement': of labelers with each other, see
    `labeler_agreement`, 'best': see `best_of`, 'ties': see `tied_best`}.
  """
  by_labeler: dict[str, list[Item]] = collections.defaultdict(list)
  for item in items:
    if item.labeler is not None:
      by_labeler[item.labeler].append(item)
  settings = {"bootstrap": bootstrap, "seed": seed}
  return {
    "all": row(items, **settings),
    "labelers": {name: row(rows, **settings) for name, rows in sorted(by_labeler.items())},
    "agreement": labeler_agreement(items, **settings),
    "best": best_of(items, **settings),
    "ties": tied_best(items, **settings),
  }


def labeler_agreement(items: Sequence[Item], *, bootstrap: int, seed: int) -> Any:
  """How often two labelers of the same answers order a pair alike that neither ties: the share, or None.

  Two equal answers are no pair: which is which is not known.
  """
  same: dict[tuple, list[tuple[str | None, list[int]]]] = collections.defaultdict(list)
  for item in items:  # each may have the answers in an order of its own
    order = sorted(range(len(item.answers)), key=lambda i, item=item: item.answers[i])
    texts = tuple(item.answers[i] for i in order)
    same[item.prompt, texts].append((item.labeler, [item.ranks[i] for i in order]))
  alike = []
  for (prompt, texts), rows in same.items():
    for (one, ranks), (other, others) in itertools.combinations(rows, 2):
      if one == other:
        continue
      for i, j in itertools.combinations(range(len(texts)), 2):
        orders = np.sign(ranks[i] - ranks[j]), np.sign(others[i] - others[j])
        if texts[i] != texts[j] and all(orders):
          alike.append((prompt, float(orders[0] == orders[1])))
  return _by_prompt(alike, bootstrap, np.random.default_rng(seed))


def credit(scores: Sequence[float]) -> float:
  """What RewardBench 2 gives for a best-of-N, the correct answer first: 1 if it is highest, shared with equal ones."""
  highest = max(scores)
  return 1 / sum(score == highest for score in scores) if scores[0] == highest else 0.0


def best_of(items: Sequence[Item], *, bootstrap: int, seed: int) -> dict[str, Any]:
  """How often the best answer has the highest score (RewardBench 2's best-of-4), by the number of answers.

  Only items with one best answer count.

  Returns:
    number of answers -> {'share': (value, interval), 'items', 'chance': what guessing gives}.
  """
  found: dict[int, list[tuple[str, float]]] = collections.defaultdict(list)
  for item in items:
    best = [i for i, rank in enumerate(item.ranks) if rank == min(item.ranks)]
    if len(best) == 1:
      others = [score for i, score in enumerate(item.scores) if i != best[0]]
      found[len(item.ranks)].append((item.prompt, credit([item.scores[best[0]], *others])))
  rng = np.random.default_rng(seed)
  return {
    str(count): {
      "share": _by_prompt(rows, bootstrap, rng),
      "items": len(rows),
      "chance": 1 / count,
    }
    for count, rows in sorted(found.items())
  }


def tied_best(items: Sequence[Item], *, bootstrap: int, seed: int) -> dict[str, Any] | None:
  """Of items with several equally good answers and worse ones: how often all of the good ones score higher, and how
  often by more than they differ among themselves (both as RewardBench 2's Ties asks); None without such items.
  """
  above, clear = [], []
  for item in items:
    good = [s for s, rank in zip(item.scores, item.ranks) if rank == min(item.ranks)]
    bad = [s for s, rank in zip(item.scores, item.ranks) if rank != min(item.ranks)]
    if len(good) > 1 and bad:
      gap = min(good) - max(bad)
      above.append((item.prompt, float(gap > 0)))
      clear.append((item.prompt, float(gap > max(good) - min(good))))
  if not above:
    return None
  rng = np.random.default_rng(seed)
  return {
    "items": len(above),
    "above": _by_prompt(above, bootstrap, rng),
    "clear": _by_prompt(clear, bootstrap, rng),
  }


def _by_prompt(rows: Sequence[tuple[str, float]], bootstrap: int, rng):
  value_N = np.array([value for _, value in rows])
  return share(value_N, numbers_of(prompt for prompt, _ in rows), bootstrap, rng)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One row of RewardBench 2.

  Attributes:
    id: of its subset Ties, `ref:NUMBER` or `tied:NUMBER`.
    subset: its name.
    num_correct: answers that are right; they come first.
    scores: the reward model's, of all answers.
  """

  id: str
  subset: str
  num_correct: int
  scores: Sequence[float]


TIES = "Ties"


def rewardbench2(entries: Sequence[Entry]) -> dict[str, float]:
  """RewardBench 2's score of each subset, and their mean, which is its headline number (arXiv:2506.01937, sec 4)."""
  by_subset: dict[str, list[Entry]] = collections.defaultdict(list)
  for entry in entries:
    by_subset[entry.subset].append(entry)
  found = {
    name: ties_score(rows)
    if name == TIES
    else float(np.mean([credit(entry.scores) for entry in rows]))
    for name, rows in by_subset.items()
  }
  return found | {"mean": float(np.mean(list(found.values())))} if found else {}


def ties_score(entries: Sequence[Entry]) -> float:
  """The score of the subset Ties: accuracy on questions with one right answer (`ref`) and with several (`tied`), .3
  each; .2 each for right answers that differ by less than the gap to the wrong ones, in the tied question and in both;
  and .01 for how much less.
  """
  stats: Mapping[str, dict[str, tuple[float, float | None]]] = {"ref": {}, "tied": {}}
  for entry in entries:
    kind, _, number = entry.id.partition(":")
    good, bad = entry.scores[: entry.num_correct], entry.scores[entry.num_correct :]
    within = max(good) - min(good) if len(good) > 1 else None
    stats[kind][number] = (min(good) - max(bad), within)
  accuracy = {
    kind: float(np.mean([gap > 0 for gap, _ in rows.values()])) if rows else 0.0
    for kind, rows in stats.items()
  }
  both = [
    (stats["ref"][number][0], gap, within)
    for number, (gap, within) in stats["tied"].items()
    if number in stats["ref"] and within is not None
  ]
  mean: Callable[[list], float] = lambda values: float(np.mean(values)) if values else 0.0
  return (
    0.3 * accuracy["tied"]
    + 0.3 * accuracy["ref"]
    + 0.2 * mean([gap > within for _, gap, within in both])
    + 0.2 * mean([min(ref, gap) > within for ref, gap, within in both])
    + 0.01 * mean([np.tanh(min(ref, gap) / within - 1) for ref, gap, within in both if within > 0])
  )
