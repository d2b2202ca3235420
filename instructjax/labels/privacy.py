"""One person's data: all of it as JSON, and its deletion. Called by the command."""

from typing import Any

import sqlalchemy as sa

from instructjax.labels import accounts, prompts, schema
from instructjax.labels.schema import Database

# Tables with a column user_id, in an order in which rows may be deleted.
_OWN = ("sessions", "survey", "grades", "submissions", "assignments", "prompts", "audit")


def data_of(database: Database, name: str) -> dict[str, Any]:
  """Everything that the database holds of a person, but for the hashes of password and sessions.

  Raises:
    UserError: there is no such person.
  """
  number = accounts.number_of(database, name)
  hidden = ("password", "token")
  with database.read() as connection:
    # By their first column: PostgreSQL gives rows as they lie.
    rows = lambda query: [
      {key: value for key, value in row.items() if key not in hidden}
      for row in connection.execute(query.order_by(next(iter(query.selected_columns)))).mappings()
    ]
    found = {"person": rows(sa.select(schema.users).where(schema.users.c.id == number))}
    for table in (schema.metadata.tables[own] for own in _OWN):
      found[table.name] = rows(sa.select(table).where(table.c.user_id == number))
    own = sa.select(schema.submissions.c.id).where(schema.submissions.c.user_id == number)
    graded = schema.grades.c.submission_id.in_(own)
    found["graded"] = rows(sa.select(schema.grades).where(graded))  # by others
    found["drafts"] = rows(sa.select(schema.drafts).where(_own_drafts(number)))
    found["attempts"] = rows(sa.select(schema.attempts).where(schema.attempts.c.name == name))
    found["items"] = rows(sa.select(schema.items).where(_wrote(connection, name, number)))
  return found


def _wrote(connection: sa.Connection, name: str, number: int):
  """Items whose prompt is a person's, by name or from this project's playground."""
  return schema.items.c.author.in_((name, prompts.author(connection, number)))


def _own_drafts(number: int):
  own = sa.select(schema.assignments.c.id).where(schema.assignments.c.user_id == number)
  return schema.drafts.c.assignment_id.in_(own)


def delete(database: Database, name: str, now: float) -> dict[str, int]:
  """Deletes a person with everything that the person has made, and returns the number of rows by table.

  What others have made of the person's prompts stays; the prompts lose the author's name. Copies (exports, backups,
  models trained on them) are not reached.

  Raises:
    UserError: there is no such person.
  """
  number = accounts.number_of(database, name)
  counts = {}
  with database.write() as connection, schema.without_triggers(connection):
    grades, submissions = schema.grades, schema.submissions
    own = sa.select(submissions.c.id).where(submissions.c.user_id == number)
    connection.execute(grades.delete().where(grades.c.submission_id.in_(own)))
    counts["drafts"] = connection.execute(
      schema.drafts.delete().where(_own_drafts(number))
    ).rowcount
    for table in (schema.metadata.tables[own] for own in _OWN):
      counts[table.name] = connection.execute(
        table.delete().where(table.c.user_id == number)
      ).rowcount
    attempts, items = schema.attempts, schema.items
    connection.execute(attempts.delete().where(attempts.c.name == name))
    is_own = _wrote(connection, name, number)
    connection.execute(items.update().where(is_own).values(author=""))
    connection.execute(schema.users.delete().where(schema.users.c.id == number))
    schema.log(connection, None, "person deleted", f"person {number}", now)
  schema.forget_pages(database)
  return counts
