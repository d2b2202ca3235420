"""How far people agree: pairs of answers ordered alike, Krippendorff's alpha, and how a labeler's ratings differ.

Called by the researcher's pages. Pure functions of judgements; means and intervals are those of report/intervals.py.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from instructjax.report import intervals

_BOOTSTRAP = 1000

Ranks = Mapping[int, int]  # number of an answer -> its rank


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of things counted by item, with its 95% interval over items.

  Attributes:
    mean: None where nothing was counted.
    low, high: the interval.
    count: what the share is of.
    items: number of items.
  """

  mean: float | None
  low: float
  high: float
  count: int
  items: int


def alike(a: Ranks, b: Ranks) -> tuple[int, int]:
  """(pairs ordered alike, pairs that neither calls a tie) of two people's ranks of the same answers."""
  same = decided = 0
  for x, y in itertools.combinations(sorted(a.keys() & b.keys()), 2):
    first, second = np.sign(a[x] - a[y]), np.sign(b[x] - b[y])
    decided += bool(first and second)
    same += bool(first and first == second)
  return same, decided


def share(counted: Iterable[tuple[float, int]]) -> Share:
  """The share of (hits, tries) by item: sums over items, which are resampled as wholes, being independent."""
  rows = np.array([row for row in counted if row[1]], float).reshape(-1, 2)
  if not len(rows):
    return Share(None, 0.0, 1.0, 0, 0)
  hits, tries = rows.T
  rng = np.random.default_rng(0)
  index = rng.integers(len(rows), size=(_BOOTSTRAP, len(rows)))
  low, high = np.percentile(hits[index].sum(1) / tries[index].sum(1), [2.5, 97.5])
  mean = hits.sum() / tries.sum()
  return Share(float(mean), float(low), float(high), int(tries.sum()), len(rows))


def mean_share(values: Sequence[float]) -> Share:
  """The mean of values of independent things, as a Share."""
  if not values:
    return Share(None, 0.0, 1.0, 0, 0)
  rng = np.random.default_rng(0)
  mean, (low, high) = intervals.mean_interval(np.asarray(values, float), _BOOTSTRAP, rng)
  return Share(mean, low, high, len(values), len(values))


def of_pairs(items: Iterable[Mapping[str, Ranks]]) -> dict[tuple[str, str], Share]:
  """Agreement of each two people, by their names in order.

  Args:
    items: for each item, name -> ranks of those who ranked it.
  """
  counted = collections.defaultdict(list)
  for ranked in items:
    for a, b in itertools.combinations(sorted(ranked), 2):
      counted[a, b].append(alike(ranked[a], ranked[b]))
  return {pair: share(rows) for pair, rows in sorted(counted.items())}


def overall(items: Iterable[Mapping[str, Ranks]]) -> Share:
  """Agreement of any two people who ranked the same item (sec 3.4 of the paper: 72.6% +- 1.5%)."""
  return share(_within(ranked, lambda a, b: True) for ranked in items)


def of_person(items: Iterable[Mapping[str, Ranks]], name: str) -> Share:
  """Agreement of one person with all others who ranked the same items."""
  return share(_within(ranked, lambda a, b: name in (a, b)) for ranked in items)


def _within(ranked: Mapping[str, Ranks], counts: Callable[[str, str], bool]) -> tuple[int, int]:
  rows = [
    alike(ranked[a], ranked[b])
    for a, b in itertools.combinations(sorted(ranked), 2)
    if counts(a, b)
  ]
  return sum(same for same, _ in rows), sum(decided for _, decided in rows)


def disagreement(ranked: Mapping[str, Ranks]) -> float | None:
  """The share of decided pairs of an item that two people order in opposite ways; None if there is none."""
  same, decided = _within(ranked, lambda a, b: True)
  return 1 - same / decided if decided else None


def win_rates(
  rankings: Iterable[Ranks], origins: Mapping[int, str]
) -> dict[tuple[str, str], Share]:
  """How often people rank an answer of one model above an answer of another to the same prompt; a tie is half a win.

  Args:
    rankings: each person's ranks of an item's answers.
    origins: number of an answer -> the model that gave it.
  Returns:
    For each two models, in order of their names, the first one's share; intervals are over rankings.
  """
  counted = collections.defaultdict(list)
  for ranks in rankings:
    row = collections.defaultdict(lambda: [0.0, 0])
    for x, y in itertools.permutations(ranks, 2):
      if origins[x] < origins[y]:
        row[origins[x], origins[y]][0] += (ranks[x] < ranks[y]) + 0.5 * (ranks[x] == ranks[y])
        row[origins[x], origins[y]][1] += 1
    for pair, (wins, pairs) in row.items():
      counted[pair].append((wins, pairs))
  return {pair: share(rows) for pair, rows in sorted(counted.items())}


def bias(ratings: Iterable[Mapping[str, float]], name: str) -> Share:
  """How much higher one person rates answers than the others who rated the same, on average.

  Args:
    ratings: for each answer, name -> rating.
    name: the person.
  """
  differences = [
    rated[name] - float(np.mean([value for other, value in rated.items() if other != name]))
    for rated in ratings
    if name in rated and len(rated) > 1
  ]
  return mean_share(differences)


def alpha(units: Iterable[Sequence[float]], level: str = "ordinal") -> float | None:
  """Krippendorff's alpha: 1 is perfect agreement, 0 what chance gives; None where it is not defined.

  Args:
    units: for each thing judged, the values that it was given; by whom does not matter. Units with less than two values
      do not count.
    level: of the values: nominal, ordinal or interval.
  Raises:
    ValueError: there is no such level.

  Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), with its coincidence matrix.
  """
  if level not in ("nominal", "ordinal", "interval"):
    raise ValueError(f"level={level!r} must be nominal, ordinal or interval")
  counted = [list(values) for values in units if len(values) > 1]
  values = sorted({value for unit in counted for value in unit})
  if len(values) < 2:
    return None
  place = {value: i for i, value in enumerate(values)}
  coincidence = np.zeros((len(values), len(values)))
  for unit in counted:
    for a, b in itertools.permutations(range(len(unit)), 2):
      coincidence[place[unit[a]], place[unit[b]]] += 1 / (len(unit) - 1)
  total_V = coincidence.sum(axis=1)
  difference = _differences(np.array(values, float), total_V, level)
  observed = (coincidence * difference).sum()
  expected = (np.outer(total_V, total_V) * difference).sum() / (total_V.sum() - 1)
  return float(1 - observed / expected)


def _differences(value_V: np.ndarray, total_V: np.ndarray, level: str) -> np.ndarray:
  """Squared differences of each two values."""
  if level == "nominal":
    return 1.0 - np.eye(len(value_V))
  if level == "interval":
    return np.subtract.outer(value_V, value_V) ** 2
  # How many values lie between the two, both ends counted half.
  middle_V = np.cumsum(total_V) - total_V / 2
  return np.subtract.outer(middle_V, middle_V) ** 2
