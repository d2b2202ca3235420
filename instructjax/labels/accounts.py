"""People: accounts, passwords, roles, and sessions of the browser.

Called by the pages and by the command. Passwords are hashed by argon2. A session is a random token in a cookie; the
database holds its hash, so that a copy of the database signs nobody in.
"""

import dataclasses
import hashlib
import hmac
import re
import secrets

import argon2
import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.data.label_records import COHORTS
from instructjax.data.messages import quoted
from instructjax.labels import schema
from instructjax.labels.schema import Database, attempts, sessions, users

ROLES = ("labeler", "researcher", "admin", "user")  # a user has the playground only
SHORTEST = 10  # letters of a password
_LONGEST = 1000
_NAME = re.compile(r"[\w][\w.@+-]{0,79}")
_NUMBERED = re.compile(r"u[0-9]+")  # a user in pools of earlier versions, see prompts.author
SESSION_SECONDS = 12 * 3600.0  # without a click
_WINDOW = 15 * 60.0  # seconds over which failed sign-ins are counted
_MOST = {
  "pair": 5,
  "address": 30,
  "name": 100,
}  # failures of a name from an address; of either alone

# OWASP's profile. The library's own takes 64 MiB for each hash: twenty people who sign in at once would take 1.3 GB.
_hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
# Verified where there is no such account, so that the time of an answer does not tell which names exist.
_NOBODY = _hasher.hash(secrets.token_hex())


class TooMany(Exception):
  """Sign-in is refused for a while, after too many wrong passwords."""


@dataclasses.dataclass(frozen=True)
class User:
  """A person who is signed in."""

  id: int
  name: str
  role: str


def add(
  database: Database,
  name: str,
  role: str,
  password: str | None,
  now: float,
  cohort: str = "training",
) -> int:
  """Makes an account in a transaction of its own, and returns its number.

  Args:
    database: the project's.
    name: stands as `labeler` in exported records.
    role: one of ROLES.
    password: None for an account that cannot sign in, such as a simulated labeler's.
    now: the time.
    cohort: training, or heldout for labelers whose rankings are kept from training.
  Raises:
    UserError: the name is taken, or one of the values is not allowed.
  """
  _require_name(name)
  if role not in ROLES:
    raise UserError(f"role {quoted(role, 40)} must be one of {', '.join(ROLES)}")
  if cohort not in COHORTS:
    raise UserError(f"cohort {quoted(cohort, 40)} must be one of {', '.join(COHORTS)}")
  # Before the transaction: a hash takes long, on purpose.
  hashed = "" if password is None else hash_password(password)
  with database.write() as connection:
    return add_to(connection, name, role, hashed, now, cohort)


def add_to(
  connection: sa.Connection, name: str, role: str, hashed: str, now: float, cohort: str
) -> int:
  """Makes an account, and returns its number.

  Args:
    connection: a transaction that writes.
    name, role, now, cohort: as in `add`.
    hashed: the password's hash; '' for an account that cannot sign in.
  Raises:
    UserError: the name is taken or not allowed.
  """
  _require_name(name)
  if connection.execute(sa.select(users.c.id).where(users.c.name == name)).first():
    raise UserError(f"there is a person named {quoted(name, 90)} already")
  number = schema.insert(
    connection,
    users,
    name=name,
    password=hashed,
    role=role,
    cohort=cohort,
    is_active=True,
    created=now,
  )
  schema.log(connection, number, "account made", role, now)
  return number


def _require_name(name: str):
  if not _NAME.fullmatch(name):
    raise UserError(f"name {quoted(name, 90)} must be up to 80 letters, digits or . _ @ + -")
  if not may_be_named(name):
    raise UserError(
      f"name {quoted(name, 90)} must not be u and a number, as pools of prompts name users of the playground"
    )


def may_be_named(name: str) -> bool:
  """Whether a name of an account's letters is none by which a pool of prompts may name a user."""
  return not _NUMBERED.fullmatch(name)


def new_password() -> str:
  return secrets.token_urlsafe(12)


def hash_password(password: str) -> str:
  """The hash of a password that is long enough.

  Raises:
    UserError: it is too short or too long.
  """
  if not SHORTEST <= len(password) <= _LONGEST:
    raise UserError(f"a password must have {SHORTEST} to {_LONGEST} characters")
  return _hasher.hash(password)


def sign_in(database: Database, name: str, password: str, address: str, now: float) -> str | None:
  """A new session's token, or None if name and password do not belong together.

  Args:
    database: the project's.
    name, password: as typed.
    address: where from; wrong passwords are counted for it.
    now: the time.
  Raises:
    TooMany: after too many wrong passwords.
  """
  name, password = name[:80], password[:_LONGEST]
  with database.read() as connection:
    _require_few(connection, name, address, now)
    found = connection.execute(
      sa.select(users).where(users.c.name == name, users.c.is_active.is_(True))
    ).first()
  # Before any transaction that writes: a hash takes long, on purpose.
  is_right = _verify(found.password if found and found.password else _NOBODY, password)
  if found is None or not found.password or not is_right:
    with database.write() as connection:
      connection.execute(attempts.insert().values(name=name, address=address, at=now))
      schema.log(connection, found.id if found else None, "sign-in failed", "", now)
    return None
  token = secrets.token_urlsafe(32)
  with database.write() as connection:
    connection.execute(sessions.delete().where(sessions.c.expires < now))
    connection.execute(attempts.delete().where(attempts.c.at < now - _WINDOW))
    connection.execute(
      sessions.insert().values(token=_hash(token), user_id=found.id, expires=now + SESSION_SECONDS)
    )
    schema.log(connection, found.id, "signed in", "", now)
  return token


def _require_few(connection: sa.Connection, name: str, address: str, now: float):
  is_name, is_address = attempts.c.name == name, attempts.c.address == address
  recent = sa.select(sa.func.count()).where(attempts.c.at > now - _WINDOW)
  for kind, where in (("pair", is_name & is_address), ("address", is_address), ("name", is_name)):
    if connection.execute(recent.where(where)).scalar_one() >= _MOST[kind]:
      raise TooMany


def _verify(hashed: str, password: str) -> bool:
  try:
    return _hasher.verify(hashed, password)
  except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
    return False


def _hash(token: str) -> str:
  return hashlib.sha256(token.encode()).hexdigest()


def who(database: Database, token: str, now: float) -> User | None:
  """The person of a session; None if it has ended. A session that is used goes on."""
  hashed = _hash(token)
  with database.read() as connection:
    found = connection.execute(
      sa.select(users.c.id, users.c.name, users.c.role, sessions.c.expires)
      .join(sessions, sessions.c.user_id == users.c.id)
      .where(sessions.c.token == hashed, sessions.c.expires > now, users.c.is_active.is_(True))
    ).first()
  if found is None:
    return None
  if found.expires < now + SESSION_SECONDS / 2:
    with database.write() as connection:
      connection.execute(
        sessions.update().where(sessions.c.token == hashed).values(expires=now + SESSION_SECONDS)
      )
  return User(found.id, found.name, found.role)


def sign_out(database: Database, token: str, user: User, now: float):
  """Ends a session."""
  with database.write() as connection:
    connection.execute(sessions.delete().where(sessions.c.token == _hash(token)))
    schema.log(connection, user.id, "signed out", "", now)


def change_password(database: Database, user: User, old: str, new: str, token: str, now: float):
  """Sets a person's own password, and ends the person's other sessions.

  Raises:
    UserError: the old password is wrong, or the new one too short.
  """
  with database.read() as connection:
    found = connection.execute(
      sa.select(users.c.password).where(users.c.id == user.id)
    ).scalar_one()
  if not _verify(found, old[:_LONGEST]):
    raise UserError("the old password is not right")
  _set_password(database, user.id, hash_password(new), now, keep=_hash(token))


def reset_password(database: Database, name: str, now: float) -> str:
  """Gives a person a new password, which is returned, and ends all of the person's sessions.

  Raises:
    UserError: there is no such person.
  """
  number, password = number_of(database, name), new_password()
  _set_password(database, number, hash_password(password), now)
  return password


def _set_password(database: Database, number: int, hashed: str, now: float, keep: str = ""):
  with database.write() as connection:
    connection.execute(users.update().where(users.c.id == number).values(password=hashed))
    connection.execute(
      sessions.delete().where(sessions.c.user_id == number, sessions.c.token != keep)
    )
    schema.log(connection, number, "password changed", "", now)


def set_active(database: Database, name: str, is_active: bool, now: float):
  """Lets a person in or not. One who is not let in is signed out.

  Raises:
    UserError: there is no such person.
  """
  number = number_of(database, name)
  with database.write() as connection:
    connection.execute(users.update().where(users.c.id == number).values(is_active=is_active))
    if not is_active:
      connection.execute(sessions.delete().where(sessions.c.user_id == number))
    schema.log(connection, number, "let in" if is_active else "shut out", "", now)


def number_of(database: Database, name: str) -> int:
  """The number of the person of this name.

  Raises:
    UserError: there is none.
  """
  with database.read() as connection:
    found = connection.execute(sa.select(users.c.id).where(users.c.name == name)).scalar()
  if found is None:
    raise UserError(f"there is no person named {quoted(name, 90)}")
  return found


def everybody(database: Database) -> list[sa.Row]:
  """All people, by name."""
  with database.read() as connection:
    return list(connection.execute(sa.select(users).order_by(users.c.name)))


def csrf(token: str) -> str:
  """What forms of a session must hold: other sites can send a form with the cookie, but cannot read this."""
  return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()
