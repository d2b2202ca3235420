"""The paper's four criteria for choosing labelers (App. B.1), from items that researchers have worked on too.

(1) agreement on what is sensitive speech, (2) agreement on rankings, (3) demonstrations on sensitive prompts, graded 1
to 7, (4) the self-assessed ability to identify sensitive speech. The cutoffs of (1), (2) and (3) are soft: whoever is
near one is a researcher's decision. Called by the researcher's pages. Pure functions.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from instructjax.labels import agreement
from instructjax.labels.agreement import Share
from instructjax.labels.judgements import Judgement
from instructjax.report import intervals

AGREEMENT, GRADE = 0.75, 6.0  # soft cutoffs of the paper
_LEAST_ITEMS = 5
SUBJECTS = (
  "Race and ethnicity",
  "Gender",
  "Sexual orientation",
  "Religion",
  "Nationality",
  "Disability",
  "Age",
  "Politics",
)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A labeler's screening.

  Attributes:
    name: the labeler.
    sensitive: share of answers flagged as the researchers' majority flags them.
    ranking: share of pairs ordered as a researcher orders them, of those that neither calls a tie.
    grade: mean grade of the demonstrations.
    subjects: what the labeler says to be able to identify well.
  """

  name: str
  sensitive: Share
  ranking: Share
  grade: Share
  subjects: tuple[str, ...]

  @property
  def passes(self) -> bool | None:
    """Whether the three cutoffs are met; None if the intervals leave it open, or nothing was measured."""
    return intervals.all_of(
      _reaches(self.sensitive, AGREEMENT),
      _reaches(self.ranking, AGREEMENT),
      _reaches(self.grade, GRADE),
    )

  @property
  def is_above(self) -> bool:
    """Whether each measured mean is at its cutoff or above, as the paper's soft cutoffs have it."""
    shares = ((self.sensitive, AGREEMENT), (self.ranking, AGREEMENT), (self.grade, GRADE))
    return all(one.mean is not None and one.mean >= cutoff for one, cutoff in shares)


def _reaches(found: Share, cutoff: float) -> bool | None:
  if found.items < _LEAST_ITEMS:  # a bootstrap over so few is narrower than what is known
    return None
  return intervals.at_least((found.low, found.high), cutoff)


def candidates(
  found: Sequence[Judgement],
  grades: Mapping[int, Sequence[int]],
  assessed: Mapping[str, Mapping[str, int]],
) -> list[Candidate]:
  """The screening of each labeler who has worked on an item of it, by name.

  Args:
    found: all judgements.
    grades: submission -> grades.
    assessed: name -> subject -> level.
  """
  own = [one for one in found if one.is_screening]
  researchers = [one for one in own if one.role != "labeler"]
  by_item: dict[int, list[Judgement]] = {}
  for one in researchers:
    by_item.setdefault(one.item_id, []).append(one)
  names = sorted({one.name for one in own if one.role == "labeler"})
  return [
    _candidate(
      name, [one for one in own if one.name == name], by_item, grades, assessed.get(name, {})
    )
    for name in names
  ]


def _candidate(name, own, by_item, grades, assessed) -> Candidate:
  ranking, sensitive, graded = [], [], []
  for one in own:
    theirs = by_item.get(one.item_id, [])
    rows = [agreement.alike(one.ranks, other.ranks) for other in theirs]
    ranking.append((sum(same for same, _ in rows), sum(decided for _, decided in rows)))
    sensitive.append(_flagged_alike(one, theirs))
    if values := grades.get(one.submission_id, ()):
      graded.append(sum(values) / len(values))
  subjects = tuple(subject for subject, level in assessed.items() if level == 2)
  shares = agreement.share(sensitive), agreement.share(ranking), agreement.mean_share(graded)
  return Candidate(name, *shares, subjects)


def _flagged_alike(one: Judgement, theirs: Sequence[Judgement]) -> tuple[int, int]:
  """(answers flagged as the majority of the researchers does, answers on which they have a majority)."""
  same = count = 0
  for answer, flag in one.sensitive.items():
    votes = [other.sensitive[answer] for other in theirs if answer in other.sensitive]
    if 2 * sum(votes) != len(votes):
      count += 1
      same += flag == (2 * sum(votes) > len(votes))
  return same, count
