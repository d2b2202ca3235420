"""A project of an earlier version gets what it lacks, and keeps what it has."""

import contextlib
import sqlite3

import pytest
import sqlalchemy as sa

from instructjax.data import label_records
from instructjax.labels import accounts, privacy, projects, prompts, rounds, schema, versions, work
from tests.labels import app

NUMBERED = ("users", "items", "submissions")


def fill(place):
  """A project in which ann has ranked an item."""
  found = app.make_project(place, [app.item()])
  ann = app.user(found, "ann")
  app.submit(found, ann, work.next_item(found, ann, 1.0))
  return found


@pytest.fixture
def database(tmp_path):
  return fill(tmp_path)


@pytest.fixture
def old(tmp_path, monkeypatch):
  """A project whose numbers SQLite would give again."""
  with monkeypatch.context() as patch:
    for name in NUMBERED:
      patch.setitem(schema.metadata.tables[name].dialect_kwargs, "sqlite_autoincrement", False)
    found = fill(tmp_path)
  found.close()
  return tmp_path


def test_tables_and_columns_are_added(database, tmp_path):
  """It has rows, and neither the columns `batch` and `reopened` nor the tables of trainings and of users' prompts."""
  with database.write() as connection:
    connection.exec_driver_sql("DROP INDEX ix_items_batch")
    connection.exec_driver_sql("ALTER TABLE items DROP COLUMN batch")
    connection.exec_driver_sql("ALTER TABLE assignments DROP COLUMN reopened")
    for table in ("trainings", "prompts"):
      connection.exec_driver_sql(f"DROP TABLE {table}")
  database.close()
  # What only reads it needs none of this.
  assert label_records.rows(str(tmp_path), "comparisons", "all")
  again = schema.open_(str(tmp_path))
  with again.read() as connection:
    assert connection.execute(sa.select(schema.items.c.batch)).scalars().all() == [""]
    assert connection.execute(sa.select(schema.assignments.c.reopened)).scalars().all() == [0.0]
    indexes = sa.inspect(connection).get_indexes("items")
    assert "ix_items_batch" in {index["name"] for index in indexes}
    assert not connection.execute(schema.trainings.select()).all()
    assert len(connection.execute(schema.submissions.select()).all()) == 1
  assert rounds.put(again, [app.item("new", batch="b")], 1.0, 0)


def described(place) -> dict[str, str]:
  """Name of each table, index and trigger -> the statement that makes it."""
  with contextlib.closing(sqlite3.connect(place / "labels.sqlite")) as connection:
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: " ".join(statement.replace('"', "").split()) for name, statement in rows}


@pytest.mark.sqlite
def test_numbers_that_would_be_given_again_are_given_once(old, tmp_path):
  assert not any("AUTOINCREMENT" in statement for statement in described(old).values())
  database = schema.open_(str(old))
  schema.create(str(tmp_path / "new")).close()
  assert described(old) == described(tmp_path / "new")
  with database.read() as connection:
    assert not connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    (sent,) = connection.execute(schema.submissions.select()).all()
  assert (sent.id, sent.item_id, sent.user_id, sent.seconds, sent.at) == (1, 1, 1, 1.0, 2000.0)
  with pytest.raises(sa.exc.DatabaseError, match="append-only"), database.write() as connection:
    connection.execute(schema.submissions.delete())
  with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"), database.write() as connection:
    connection.execute(schema.users.delete())
  privacy.delete(database, "ann", 3.0)
  assert accounts.add(database, "bea", "labeler", None, 4.0) == 2


def test_a_project_that_lacks_nothing_is_left_alone(old, monkeypatch):
  schema.open_(str(old)).close()
  monkeypatch.setattr(versions, "complete", None)
  schema.open_(str(old)).close()


def test_authors_of_this_project_get_its_token(database, tmp_path):
  """`u1` with a prompt that is kept here is the user of this project; with another prompt it may be anybody's."""
  ann = app.user(database, "ann")
  prompts.keep(database, ann, "“Mine”", 1.0)
  new = [app.item(prompt, author="u1") for prompt in ("“Mine”", "Another's")]
  projects.add(database, new, 1.0)
  with database.write() as connection:
    connection.execute(schema.settings.delete())
  database.close()
  again = schema.open_(str(tmp_path))
  with again.read() as connection:
    authors = (
      connection.execute(sa.select(schema.items.c.author).order_by(schema.items.c.id))
      .scalars()
      .all()
    )
    token = versions.project_token(connection)
  assert len(token) == 16 and authors == ["", f"u1:{token}", "u1"]
  assert [row["prompt"] for row in privacy.data_of(again, "ann")["items"]] == ['"“Mine”"']
  again.close()
  with schema.create(str(tmp_path)).read() as connection:
    assert versions.project_token(connection) == token
