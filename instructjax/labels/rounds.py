"""Answers that a training run has people rank while it waits: the items of a later round of comparisons.

Called by stages/people.py and by the command. All items of a round have the name of its batch, so that a run which was
stopped in between finds its own again.
"""

import dataclasses
from collections.abc import Sequence

import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.data.messages import quoted
from instructjax.labels import projects, schema
from instructjax.labels.schema import Database, assignments, items, users


@dataclasses.dataclass(frozen=True)
class State:
  """How far people are with a batch.

  Attributes:
    items: number of items.
    ranked: items that at least one person has ranked, of those whose rankings train or validate.
    missing: rankings that are still wanted.
    given_up: items that nobody is left to rank: all who might have skipped them.
  """

  items: int
  ranked: int
  missing: int
  given_up: int


def put(database: Database, new: Sequence[projects.Item], now: float, seed: int) -> bool:
  """Adds the items of a batch, all or none; False if they are there already.

  Args:
    database: the project's.
    new: items of one batch.
    now: the time.
    seed: shuffles the answers of each.
  Raises:
    UserError: see `projects.require_whole`.
  """
  (batch,) = {item.batch for item in new}
  with database.write() as connection:
    schema.one_at_a_time(connection)
    if connection.execute(sa.select(items.c.id).where(items.c.batch == batch).limit(1)).first():
      return False
    projects.add_to(connection, new, now, seed)
  return True


def want(database: Database, batch: str, wanted: int):
  """Sets by how many people each item of a batch is to be ranked, but for those that were closed."""
  with database.write() as connection:
    is_open = (items.c.batch == batch) & (items.c.wanted > 0)
    connection.execute(items.update().where(is_open).values(wanted=wanted))


def state(database: Database, batch: str) -> State:
  """How far people are.

  An item that has been skipped, and that no active labeler of the cohort training is left to rank, is given up: a run
  would wait for it forever. Labelers of the cohort heldout are not waited for.
  """
  with database.read() as connection:
    return _state(connection, batch)


def states(connection: sa.Connection) -> dict[str, State]:
  """Name of each batch -> how far people are with it."""
  return {name: _state(connection, name) for name in _names(connection)}


def _state(connection: sa.Connection, batch: str) -> State:
  labelers = connection.execute(sa.select(sa.func.count()).where(_may_rank())).scalar_one()
  count = lambda state: sa.func.count().filter(assignments.c.state == state)
  own = assignments.join(
    users, (users.c.id == assignments.c.user_id) & (users.c.cohort == "training")
  )
  query = (
    sa.select(items.c.id, items.c.wanted, count("done").label("done"), _passed().label("passed"))
    .select_from(items.outerjoin(own, assignments.c.item_id == items.c.id))
    .where(items.c.batch == batch)
    .group_by(items.c.id, items.c.wanted)
  )
  rows = connection.execute(query).all()
  missing = given_up = 0
  for row in rows:
    left = max(0, row.wanted - row.done)
    if left and row.passed and labelers <= row.passed:
      left, given_up = 0, given_up + 1
    missing += left
  return State(len(rows), sum(row.done > 0 for row in rows), missing, given_up)


def _may_rank():
  """Whether a person may be given an item: not one who only stands for imported or simulated rankings."""
  is_labeler = (users.c.role == "labeler") & (users.c.cohort == "training")
  return is_labeler & users.c.is_active.is_(True) & (users.c.password != "")


def _passed():
  """Number of those who may rank an item and have ranked or skipped it; 0 if nobody has skipped it."""
  is_skipped = sa.func.count().filter(assignments.c.state == "skipped")
  is_settled = sa.func.count().filter(assignments.c.state.in_(("done", "skipped")), _may_rank())
  return sa.case((is_skipped > 0, is_settled), else_=0)


def close(database: Database, batch: str, now: float) -> int:
  """Ends a batch: nobody is asked to rank its items any more. Returns the number of items that nobody has ranked.

  Raises:
    UserError: there is no such batch.
  """
  with database.write() as connection:
    schema.one_at_a_time(connection)
    names = _names(connection)
    if batch not in names:
      raise UserError(
        f"--batch={quoted(batch, 80)} must be one of the project's: {', '.join(names) or 'there is none'}"
      )
    connection.execute(items.update().where(items.c.batch == batch).values(wanted=0))
    schema.log(connection, None, "batch closed", batch, now)
  found = state(database, batch)
  return found.items - found.ranked


def _names(connection: sa.Connection) -> list[str]:
  rows = connection.execute(sa.select(items.c.batch).where(items.c.batch != "").distinct())
  return sorted(name for (name,) in rows)
