"""The pool of prompts that users have written to an earlier model in the playground, with their consent (sec 3.2).

Called by the playground and by the command. As in the paper, a prompt that shares a long prefix with another is kept
once, and at most 200 are kept of a user, by whom they are split later.
"""

import unicodedata
from typing import Any, Literal

import sqlalchemy as sa

from instructjax.labels import schema, versions
from instructjax.labels.accounts import User
from instructjax.labels.schema import Database, prompts

MOST = 200  # prompts of a user, sec 3.2
LONG = 64  # letters that two prompts may not have in common at their beginning

Kept = Literal["kept", "known", "full"]


def prefix(text: str) -> str:
  """What decides whether two prompts are the same: their beginning, whatever its spaces and capitals are."""
  plain = unicodedata.normalize("NFKC", text).casefold()
  return " ".join(plain.split())[:LONG]


def keep(database: Database, user: User, text: str, now: float) -> Kept:
  """Adds a prompt to the pool.

  Args:
    database: the project's.
    user: who wrote it, and has consented.
    text: without what looks like personal data.
    now: the time.
  Returns:
    kept; known if one with this beginning is there; full if there are as many of this user as are kept.
  """
  with database.write() as connection:
    schema.one_at_a_time(connection)
    known = sa.select(prompts.c.id).where(prompts.c.prefix == prefix(text)).limit(1)
    if connection.execute(known).first():
      return "known"
    own = sa.select(sa.func.count()).where(prompts.c.user_id == user.id)
    if connection.execute(own).scalar_one() >= MOST:
      return "full"
    connection.execute(
      prompts.insert().values(user_id=user.id, text=text, prefix=prefix(text), at=now)
    )
    schema.log(connection, user.id, "prompt kept", "", now)
  return "kept"


def of_user(database: Database, user: User) -> list[sa.Row]:
  """A user's own prompts, the newest first."""
  with database.read() as connection:
    query = sa.select(prompts).where(prompts.c.user_id == user.id).order_by(prompts.c.id.desc())
    return list(connection.execute(query))


def forget(database: Database, user: User, number: int, now: float) -> bool:
  """Takes one of a user's own prompts out of the pool; False if it is not there."""
  with database.write() as connection:
    is_own = (prompts.c.id == number) & (prompts.c.user_id == user.id)
    count = connection.execute(prompts.delete().where(is_own)).rowcount
    if count:
      schema.log(connection, user.id, "prompt taken back", "", now)
  return bool(count)


def author(connection: sa.Connection, user_id: int) -> str:
  """The name that stands for a user in records and items; it tells nothing to those who have no database.

  It holds the project's token, so that in another project, which may be given these records, it is nobody's; and a
  letter that no account's name has.
  """
  return f"u{user_id}:{versions.project_token(connection)}"


def records(database: Database) -> list[dict[str, Any]]:
  """The pool as prompt records, whose `user` keeps all prompts of one user on one side of a split."""
  with database.read() as connection:
    rows = connection.execute(sa.select(prompts).order_by(prompts.c.id))
    return [{"prompt": row.text, "user": author(connection, row.user_id)} for row in rows]
