"""Reward models trained on a project's rankings: how often each agrees with people, beside how often people do.

Called by the command, which reads a run's results, and by the researcher's pages. A training is kept with the labelers'
agreement as it was when the reward model was trained.
"""

import dataclasses
from collections.abc import Sequence

import sqlalchemy as sa

from instructjax.labels import agreement, judgements, schema
from instructjax.labels.agreement import Share
from instructjax.labels.schema import Database, trainings

_LOWEST = 0.4  # share at the bottom of the plot; chance is .5


@dataclasses.dataclass(frozen=True)
class Training:
  """A reward model that has been trained.

  Attributes:
    identity: what it was made with, as a hash: a training is registered once.
    name: the run's folder and the stage.
    accuracy, low, high: share of held-out pairs that it orders as the labeler did, with the 95% interval.
    pairs: number of these pairs.
    at: when it was finished, in seconds since 1970, UTC.
  """

  identity: str
  name: str
  accuracy: float
  low: float
  high: float
  pairs: int
  at: float


def register(
  database: Database, new: Training, until: int, before: float, now: float
) -> tuple[Share, bool]:
  """Keeps a training, with the agreement of labelers on what it was trained with.

  Args:
    database: the project's.
    new: the training.
    until: number of the last submission that it was trained with; 0 if that is not known.
    before: time from which on submissions were not read, where `until` is not known.
    now: the time.
  Returns:
    The agreement, and whether the training was not registered before.
  """
  with database.write() as connection:
    schema.one_at_a_time(connection)
    found = connection.execute(
      sa.select(trainings).where(trainings.c.identity == new.identity)
    ).first()
    if found is not None:
      return _share(found), False
    said = judgements.read(connection, until, None if until else before)
    own = [
      one
      for one in said
      if one.role == "labeler" and one.kind == "ranking" and not one.is_screening
    ]
    agree = agreement.overall(judgements.ranked(own).values())
    values = dataclasses.asdict(new) | {
      "agreement": agree.mean,
      "agreement_low": agree.low,
      "agreement_high": agree.high,
      "agreement_pairs": agree.count,
      "agreement_items": agree.items,
    }
    connection.execute(trainings.insert().values(values))
    schema.log(connection, None, "training registered", new.name, now)
  return agree, True


def _share(row: sa.Row) -> Share:
  return Share(
    row.agreement,
    row.agreement_low,
    row.agreement_high,
    row.agreement_pairs,
    row.agreement_items,
  )


def read(connection: sa.Connection) -> list[tuple[Training, Share]]:
  """All trainings with the labelers' agreement, in the order in which they were finished."""
  names = [field.name for field in dataclasses.fields(Training)]
  rows = connection.execute(sa.select(trainings).order_by(trainings.c.at, trainings.c.id))
  return [(Training(**{name: getattr(row, name) for name in names}), _share(row)) for row in rows]


@dataclasses.dataclass(frozen=True)
class Mark:
  """A value with its interval in a plot: places in [0, 1], from the left and from the bottom."""

  x: float
  y: float
  low: float
  high: float


def marks(found: Sequence[tuple[Training, Share]]) -> tuple[list[Mark], list[Mark]]:
  """The marks of the reward models' accuracy, and of the labelers' agreement where it was measured."""
  accuracy, agree = [], []
  for i, (training, share) in enumerate(found):
    x = (i + 0.5) / len(found)
    accuracy.append(_mark(x, training.accuracy, training.low, training.high))
    if share.mean is not None:
      agree.append(_mark(x, share.mean, share.low, share.high))
  return accuracy, agree


def height(share: float) -> float:
  """The place of a share from the bottom of the plot, in [0, 1]."""
  return min(max((share - _LOWEST) / (1 - _LOWEST), 0.0), 1.0)


def _mark(x: float, mean: float, low: float, high: float) -> Mark:
  return Mark(x, height(mean), height(low), height(high))
