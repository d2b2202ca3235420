"""Accounts: passwords, sessions, and the limit on wrong passwords."""

import pytest
import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.labels import accounts, schema
from tests.labels import app


@pytest.fixture
def database(tmp_path):
  return app.make_project(tmp_path)


@pytest.mark.sqlite
def test_passwords_and_tokens_are_not_in_the_database(database, tmp_path):
  token = accounts.sign_in(database, "ann", app.PASSWORD, "here", 0.0)
  database.close()
  data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
  assert b"$argon2id$" in data
  assert token.encode() not in data and app.PASSWORD.encode() not in data


def test_a_hash_is_as_hard_as_owasp_asks():
  """At least 19 MiB and two passes; tests use a cheaper one."""
  assert app.PRODUCTION.memory_cost >= 19 * 1024 and app.PRODUCTION.time_cost >= 2
  assert app.PRODUCTION.type.name == "ID"


def test_a_session_ends_when_it_is_not_used(database):
  half, whole = accounts.SESSION_SECONDS * 0.6, accounts.SESSION_SECONDS
  token = accounts.sign_in(database, "ann", app.PASSWORD, "here", 0.0)
  assert accounts.who(database, token, half).name == "ann"  # goes on from here
  assert accounts.who(database, token, half + whole - 1).name == "ann"
  assert accounts.who(database, token, half + 3 * whole) is None
  assert accounts.who(database, "guess", 0.0) is None


def test_wrong_passwords_close_the_account_to_that_address_for_a_while(database):
  wrong = lambda name="ann", now=0.0: accounts.sign_in(database, name, "wrong", "here", now)
  assert [wrong() for _ in range(5)] == [None] * 5
  with pytest.raises(accounts.TooMany):
    accounts.sign_in(database, "ann", app.PASSWORD, "here", 1.0)
  assert accounts.sign_in(database, "ann", app.PASSWORD, "elsewhere", 1.0)
  assert accounts.sign_in(database, "ann", app.PASSWORD, "here", 15 * 60 + 1.0)


def test_an_address_cannot_try_many_names(database, monkeypatch):
  monkeypatch.setattr(accounts, "_verify", lambda hashed, password: False)
  for number in range(30):
    assert accounts.sign_in(database, f"guess{number}", "wrong", "here", 0.0) is None
  with pytest.raises(accounts.TooMany):
    accounts.sign_in(database, "ann", app.PASSWORD, "here", 1.0)


def test_a_name_that_is_not_there_costs_as_much_as_a_wrong_password(database, monkeypatch):
  verified = []
  monkeypatch.setattr(accounts, "_verify", lambda hashed, password: verified.append(hashed))
  assert accounts.sign_in(database, "nobody", "x", "here", 0.0) is None
  assert len(verified) == 1 and verified[0].startswith("$argon2id$")


def test_who_is_shut_out_is_signed_out(database):
  token = accounts.sign_in(database, "ann", app.PASSWORD, "here", 0.0)
  accounts.set_active(database, "ann", False, 1.0)
  assert accounts.who(database, token, 1.0) is None
  assert accounts.sign_in(database, "ann", app.PASSWORD, "here", 1.0) is None
  accounts.set_active(database, "ann", True, 2.0)
  assert accounts.who(database, token, 2.0) is None
  assert accounts.sign_in(database, "ann", app.PASSWORD, "here", 2.0)


def test_a_new_password_ends_the_other_sessions(database):
  first, second = (accounts.sign_in(database, "ann", app.PASSWORD, "here", 0.0) for _ in range(2))
  ann = app.user(database, "ann")
  with pytest.raises(UserError, match="old password is not right"):
    accounts.change_password(database, ann, "wrong", "a new password", first, 1.0)
  with pytest.raises(UserError, match="10 to 1000 characters"):
    accounts.change_password(database, ann, app.PASSWORD, "short", first, 1.0)
  accounts.change_password(database, ann, app.PASSWORD, "a new password", first, 1.0)
  assert accounts.who(database, first, 1.0) and not accounts.who(database, second, 1.0)


def test_an_account_without_a_password_cannot_be_signed_in_to(database):
  accounts.add(database, "simulated", "labeler", None, 0.0)
  assert accounts.sign_in(database, "simulated", "", "here", 0.0) is None


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "ann"}, "there is a person named 'ann' already"),
    ({"name": "a b"}, "must be up to 80 letters"),
    ({"name": "u7"}, "name 'u7' must not be u and a number"),
    ({"role": "king"}, "role 'king' must be one of"),
    ({"cohort": "x"}, "cohort 'x' must be one of"),
    ({"password": "short"}, "10 to 1000 characters"),
  ],
)
def test_bad_accounts_are_refused(database, values, message):
  given = {"name": "bea", "role": "labeler", "password": None} | values
  with pytest.raises(UserError, match=message):
    accounts.add(database, now=0.0, **given)


def test_who_came_and_went_is_in_the_audit_table(database):
  token = accounts.sign_in(database, "ann", app.PASSWORD, "here", 5.0)
  accounts.sign_in(database, "ann", "wrong", "here", 6.0)
  accounts.sign_out(database, token, app.user(database, "ann"), 7.0)
  with database.read() as connection:
    rows = connection.execute(sa.select(schema.audit.c.action, schema.audit.c.at)).all()
  assert [tuple(row) for row in rows[-3:]] == [
    ("signed in", 5.0),
    ("sign-in failed", 6.0),
    ("signed out", 7.0),
  ]
  assert accounts.who(database, token, 8.0) is None
