"""A labeler's work: which item comes next, drafts, what is sent, and what is skipped.

Called by the labeler's pages. Each function is one transaction.
"""

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from instructjax.labels import forms, projects, schema
from instructjax.labels.accounts import User
from instructjax.labels.schema import Database, assignments, drafts, items, submissions, users

_ABANDONED = (
  24 * 3600.0
)  # seconds after which an item that somebody has only opened is given to another
_LONGEST_WORK = 3600.0  # seconds that count where the browser has measured none
REASONS = (
  "The prompt makes no sense",
  "I do not know enough about the subject",
  "The content is disturbing",
  "The page does not show it well",
  "Another reason",
)


class Task(NamedTuple):
  """An item as one labeler sees it.

  Attributes:
    item: its row.
    answers: rows in the labeler's own order, so that no place favours a model.
    assignment: the row of the labeler's work on it.
    values: fields of the form: the draft, or what was sent.
    saved: when the draft was saved; 0 if there is none.
  """

  item: Any
  answers: list[Any]
  assignment: Any
  values: dict[str, str]
  saved: float


def next_item(database: Database, user: User, now: float) -> int | None:
  """The number of the item that a person is to work on; None if nothing is left.

  One that is open already comes first, then the items of the screening, then the others in order. Researchers get the
  items of the screening only: labelers are compared with their answers.
  """
  with database.write() as connection:
    schema.one_at_a_time(connection)
    opened = connection.execute(
      sa.select(assignments.c.item_id)
      .where(assignments.c.user_id == user.id, assignments.c.state == "open")
      .order_by(assignments.c.id)
      .limit(1)
    ).scalar()
    if opened is not None:
      return opened
    query = _free(user, now).order_by(items.c.is_screening.desc(), items.c.id).limit(1)
    found = connection.execute(query).scalar()
    if found is not None:
      _assign(connection, found, user, now)
    return found


def _free(user: User, now: float) -> sa.Select:
  """The items that a person may be given.

  Labelers of the cohort heldout get held-out items only, since nothing else of theirs is used, and take none from those
  of the cohort training: an item is wanted of so many people of each.
  """
  own = sa.select(assignments.c.id).where(
    assignments.c.item_id == items.c.id, assignments.c.user_id == user.id
  )
  is_taken = (assignments.c.state == "done") | (
    (assignments.c.state == "open") & (assignments.c.touched > now - _ABANDONED)
  )
  cohort = sa.select(users.c.cohort).where(users.c.id == user.id).scalar_subquery()
  others = users.alias()
  taken = (
    sa.select(sa.func.count())
    .select_from(assignments.join(others, others.c.id == assignments.c.user_id))
    .where(assignments.c.item_id == items.c.id, is_taken, others.c.cohort == cohort)
    .scalar_subquery()
  )
  is_free = items.c.is_screening.is_(True)  # everybody works on these
  if user.role == "labeler":
    is_free |= (taken < items.c.wanted) & ((cohort != "heldout") | (items.c.split == "validation"))
  return sa.select(items.c.id).where(~sa.exists(own), is_free)


def _assign(connection: sa.Connection, item_id: int, user: User, now: float):
  connection.execute(
    assignments.insert().values(
      item_id=item_id,
      user_id=user.id,
      state="open",
      token=secrets.token_urlsafe(16),
      opened=now,
      touched=now,
      reason="",
    )
  )


def take(database: Database, user: User, item_id: int, now: float) -> bool:
  """Gives a person a certain item; False if there is none of this number."""
  with database.write() as connection:
    if projects.get(connection, item_id) is None:
      return False
    schema.one_at_a_time(connection)
    if _assignment(connection, user, item_id) is None:
      _assign(connection, item_id, user, now)
    return True


def task(database: Database, user: User, item_id: int) -> Task | None:
  """A person's own work on an item; None if the item was not given to this person."""
  with database.read() as connection:
    assignment = _assignment(connection, user, item_id)
    found = projects.get(connection, item_id)
    if assignment is None or found is None:
      return None
    item, answers = found
    draft = connection.execute(
      sa.select(drafts).where(drafts.c.assignment_id == assignment.id)
    ).first()
    sent = connection.execute(
      sa.select(submissions.c.payload)
      .where(submissions.c.item_id == item_id, submissions.c.user_id == user.id)
      .order_by(submissions.c.id.desc())
      .limit(1)
    ).scalar()
  random.Random(f"{item_id} {user.id}").shuffle(answers)
  values = forms.values_of(item.kind, json.loads(sent)) if sent else {}
  if draft:
    values = json.loads(draft.fields)
  return Task(item, answers, assignment, values, draft.saved if draft else 0.0)


def reopen(database: Database, found: Task, now: float):
  """Notes that a person opens an item that was sent or skipped: the work of changing it begins now.

  It began before where there is a draft, or was opened less than an hour ago.
  """
  assignment = found.assignment
  is_under_way = found.saved or now - assignment.reopened < _LONGEST_WORK
  if assignment.state == "open" or (assignment.reopened and is_under_way):
    return
  is_same = (assignments.c.id == assignment.id) & (assignments.c.token == assignment.token)
  with database.write() as connection:
    connection.execute(assignments.update().where(is_same).values(reopened=now))


def _assignment(connection: sa.Connection, user: User, item_id: int) -> Any:
  return connection.execute(
    sa.select(assignments).where(assignments.c.item_id == item_id, assignments.c.user_id == user.id)
  ).first()


def save_draft(
  database: Database, user: User, found: Task, token: str, sent: Mapping[str, str], now: float
) -> bool:
  """Keeps what a labeler has filled in so far; False if this form has been sent meanwhile."""
  values = forms.kept(found.item.kind, [answer.id for answer in found.answers], sent)
  with database.write() as connection:
    schema.one_at_a_time(connection)
    assignment = _assignment(connection, user, found.item.id)
    if assignment is None or assignment.token != token:
      return False
    connection.execute(drafts.delete().where(drafts.c.assignment_id == assignment.id))
    connection.execute(
      drafts.insert().values(assignment_id=assignment.id, fields=json.dumps(values), saved=now)
    )
    connection.execute(
      assignments.update().where(assignments.c.id == assignment.id).values(touched=now)
    )
  return True


Outcome = Literal["taken", "again", "stale"]


def submit(
  database: Database,
  user: User,
  found: Task,
  token: str,
  payload: dict[str, Any],
  seconds: float,
  now: float,
) -> Outcome:
  """Takes what a labeler sends. When this returns, it is on disk.

  Returns:
    taken; again if the same form came before with the same content, of which there is still one row; stale if it came
    before with another content, which is not taken: the labeler must open the item again to change it.
  """
  text = json.dumps(payload, sort_keys=True)
  with database.write() as connection:
    schema.one_at_a_time(connection)
    before = connection.execute(sa.select(submissions).where(submissions.c.token == token)).first()
    if before is not None:
      is_same = (before.user_id, before.item_id, before.payload) == (user.id, found.item.id, text)
      return "again" if is_same else "stale"
    assignment = _assignment(connection, user, found.item.id)
    if assignment is None or assignment.token != token:
      return "stale"
    # No longer than the item was open: the browser's clock is not ours. Without scripts there is no other measure.
    is_first = assignment.state == "open"
    begun = assignment.opened if is_first else assignment.reopened or assignment.touched
    since = max(now - begun, 0.0)  # a clock may be set back
    spent = min(seconds, since) if seconds > 0 else min(since, _LONGEST_WORK)
    connection.execute(
      submissions.insert().values(
        item_id=found.item.id, user_id=user.id, token=token, payload=text, seconds=spent, at=now
      )
    )
    _close(connection, assignment, "done", "", now)
    schema.log(connection, user.id, "submitted", f"item {found.item.id}", now)
  return "taken"


def skip(database: Database, user: User, found: Task, reason: str, now: float):
  """Puts an item aside, so that another labeler gets it. What was sent before stays."""
  with database.write() as connection:
    schema.one_at_a_time(connection)
    assignment = _assignment(connection, user, found.item.id)
    if assignment is not None and assignment.state == "open":
      _close(connection, assignment, "skipped", reason, now)
      schema.log(connection, user.id, "skipped", f"item {found.item.id}: {reason}", now)


def _close(connection: sa.Connection, assignment: Any, state: str, reason: str, now: float):
  connection.execute(drafts.delete().where(drafts.c.assignment_id == assignment.id))
  connection.execute(
    assignments.update()
    .where(assignments.c.id == assignment.id)
    .values(state=state, reason=reason, touched=now, reopened=0, token=secrets.token_urlsafe(16))
  )


class Progress(NamedTuple):
  """How far a person has come."""

  done: int
  skipped: int
  left: int  # items that this person may still get
  seconds: float  # of work


def progress(database: Database, user: User, now: float) -> Progress:
  """How far a person has come."""
  with database.read() as connection:
    counted = connection.execute(
      sa.select(assignments.c.state, sa.func.count())
      .where(assignments.c.user_id == user.id)
      .group_by(assignments.c.state)
    )
    states: dict[str, int] = {state: count for state, count in counted}
    left = connection.execute(
      sa.select(sa.func.count()).select_from(_free(user, now).subquery())
    ).scalar_one()
    seconds = connection.execute(
      sa.select(sa.func.sum(submissions.c.seconds)).where(submissions.c.user_id == user.id)
    ).scalar()
  opened = states.get("open", 0)
  return Progress(states.get("done", 0), states.get("skipped", 0), left + opened, seconds or 0.0)


def history(database: Database, user: User) -> Sequence[Any]:
  """A person's own items, those worked on last first."""
  with database.read() as connection:
    return connection.execute(
      sa.select(assignments, items.c.kind, items.c.prompt)
      .join(items, items.c.id == assignments.c.item_id)
      .where(assignments.c.user_id == user.id)
      .order_by(assignments.c.touched.desc())
      .limit(500)
    ).all()
