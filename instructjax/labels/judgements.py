"""What people have said, read from the database for the researcher's pages: the newest submission of each to each item.

Called by the researcher's pages. It knows the tables; the arithmetic is in agreement.py.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from instructjax.labels import forms, schema
from instructjax.labels.agreement import Ranks
from instructjax.labels.schema import (
  answers,
  assignments,
  grades,
  items,
  submissions,
  survey,
  users,
)


@dataclasses.dataclass(frozen=True)
class Judgement:
  """One person's newest submission to an item."""

  submission_id: int
  item_id: int
  kind: str
  is_screening: bool
  source: str
  split: str
  name: str
  role: str
  payload: Mapping[str, Any]
  seconds: float
  at: float

  @property
  def ranks(self) -> Ranks:
    """Number of an answer -> rank; empty for a demonstration."""
    return {int(number): row["rank"] for number, row in self._answers()}

  @property
  def ratings(self) -> dict[int, float]:
    """Number of an answer -> overall quality, where it was rated."""
    return {
      int(number): row["overall"]
      for number, row in self._answers()
      if row.get("overall") is not None
    }

  @property
  def sensitive(self) -> dict[int, bool]:
    """Number of an answer -> whether any of the fields about sensitive speech is yes; empty where none was asked."""
    return {
      int(number): any(row[name] for name in forms.SENSITIVE)
      for number, row in self._answers()
      if set(forms.SENSITIVE) <= row.keys()
    }

  def _answers(self):
    return self.payload.get("answers", {}).items()


def read(connection: sa.Connection, until: int = 0, before: float | None = None) -> list[Judgement]:
  """All judgements, in the order in which they were sent.

  Args:
    connection: to the database.
    until: number of the last submission that counts; 0 for all.
    before: time from which on submissions do not count; None for all.
  """
  counts = sa.true() if not until else submissions.c.id <= until
  if before is not None:
    counts &= submissions.c.at < before
  newest = (
    sa.select(sa.func.max(submissions.c.id))
    .where(counts)
    .group_by(submissions.c.item_id, submissions.c.user_id)
  )
  rows = connection.execute(
    sa.select(
      submissions.c.id,
      submissions.c.payload,
      submissions.c.seconds,
      submissions.c.at,
      submissions.c.item_id,
      items.c.kind,
      items.c.is_screening,
      items.c.source,
      items.c.split,
      users.c.name,
      users.c.role,
    )
    .join(items, items.c.id == submissions.c.item_id)
    .join(users, users.c.id == submissions.c.user_id)
    .where(submissions.c.id.in_(newest))
    .order_by(submissions.c.id)
  )
  return [
    Judgement(
      submission_id=row.id,
      item_id=row.item_id,
      kind=row.kind,
      is_screening=row.is_screening,
      source=row.source,
      split=row.split,
      name=row.name,
      role=row.role,
      payload=json.loads(row.payload),
      seconds=row.seconds,
      at=row.at,
    )
    for row in rows
  ]


def ranked(found: Sequence[Judgement]) -> dict[int, dict[str, Ranks]]:
  """Item -> name -> ranks, of items that are ranked."""
  result: dict[int, dict[str, Ranks]] = {}
  for one in found:
    if one.ranks:
      result.setdefault(one.item_id, {})[one.name] = one.ranks
  return result


def rated(found: Sequence[Judgement]) -> dict[int, dict[str, float]]:
  """Answer -> name -> overall quality."""
  result: dict[int, dict[str, float]] = {}
  for one in found:
    for answer, rating in one.ratings.items():
      result.setdefault(answer, {})[one.name] = rating
  return result


def split_sizes(found: Sequence[Judgement]) -> dict[str, dict[tuple[str, str], int]]:
  """Row of Table 6 -> (split, source) -> number of prompts with a submission; prompts of the screening do not count."""
  rows = {"SFT": "demonstration", "RM": "ranking"}
  return {
    row: {
      (split, source): len(
        {
          one.item_id
          for one in found
          if (one.kind, one.split, one.source, one.is_screening) == (kind, split, source, False)
        }
      )
      for split in ("train", "validation")
      for source in ("labeler", "customer")
    }
    for row, kind in rows.items()
  }


def origins(connection: sa.Connection) -> dict[int, str]:
  """Number of an answer -> the model that gave it."""
  rows = connection.execute(sa.select(answers.c.id, answers.c.origin))
  return {number: origin for number, origin in rows}


@dataclasses.dataclass(frozen=True)
class Pace:
  """How much a person has done."""

  name: str
  done: int
  skipped: int
  hours: float

  @property
  def an_hour(self) -> float | None:
    return self.done / self.hours if self.hours else None


def paces(connection: sa.Connection) -> list[Pace]:
  """The pace of everybody who was given an item, by name."""
  states = connection.execute(
    sa.select(users.c.name, assignments.c.state, sa.func.count())
    .join(users, users.c.id == assignments.c.user_id)
    .group_by(users.c.name, assignments.c.state)
  )
  counts: dict[str, dict[str, int]] = {}
  for name, state, count in states:
    counts.setdefault(name, {})[state] = count
  seconds = connection.execute(
    sa.select(users.c.name, sa.func.sum(submissions.c.seconds))
    .join(users, users.c.id == submissions.c.user_id)
    .group_by(users.c.name)
  )
  spent = {name: total for name, total in seconds}
  return [
    Pace(name, row.get("done", 0), row.get("skipped", 0), spent.get(name, 0.0) / 3600)
    for name, row in sorted(counts.items())
  ]


def grades_by_submission(connection: sa.Connection) -> dict[int, list[int]]:
  """Submission -> researchers' grades of the demonstration."""
  result: dict[int, list[int]] = {}
  for row in connection.execute(sa.select(grades)):
    result.setdefault(row.submission_id, []).append(row.grade)
  return result


def self_assessed(connection: sa.Connection) -> dict[str, dict[str, int]]:
  """Name -> subject of sensitive speech -> how well the person says to be able to identify it, 0 to 2."""
  result: dict[str, dict[str, int]] = {}
  query = sa.select(users.c.name, survey.c.subject, survey.c.level)
  for name, subject, level in connection.execute(query.join(users, users.c.id == survey.c.user_id)):
    result.setdefault(name, {})[subject] = level
  return result


def grade(database: schema.Database, submission_id: int, user_id: int, value: int, now: float):
  """Takes a researcher's grade of a demonstration, in place of an earlier one."""
  with database.write() as connection:
    own = (grades.c.submission_id == submission_id) & (grades.c.user_id == user_id)
    connection.execute(grades.delete().where(own))
    connection.execute(
      grades.insert().values(submission_id=submission_id, user_id=user_id, grade=value, at=now)
    )
    schema.log(connection, user_id, "graded", f"submission {submission_id}: {value}", now)


def say(database: schema.Database, user_id: int, levels: Mapping[str, int], now: float):
  """Takes a person's answers to the survey, in place of earlier ones."""
  with database.write() as connection:
    connection.execute(survey.delete().where(survey.c.user_id == user_id))
    rows = [{"user_id": user_id, "subject": name, "level": level} for name, level in levels.items()]
    if rows:
      connection.execute(survey.insert(), rows)
    schema.log(connection, user_id, "answered the survey", "", now)
