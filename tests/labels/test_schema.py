"""The database: rows that may not change, what is on disk, and who may read the file."""

import os
import sqlite3
import stat
import threading

import pytest
import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.data import label_records
from instructjax.labels import accounts, privacy, schema, work
from tests.labels import app


@pytest.fixture
def database(tmp_path):
  found = app.make_project(tmp_path, [app.item()])
  ann = app.user(found, "ann")
  app.submit(found, ann, work.next_item(found, ann, 1.0))
  return found


@pytest.mark.parametrize("table", schema.APPEND_ONLY)
@pytest.mark.parametrize("verb", ["update", "delete"])
def test_append_only_tables_refuse_changes(database, table, verb):
  found = schema.metadata.tables[table]
  statement = found.delete() if verb == "delete" else found.update().values(at=0.0)
  with pytest.raises(sa.exc.DatabaseError, match="append-only"), database.write() as connection:
    connection.execute(statement)
  with database.read() as connection:
    assert connection.execute(sa.select(found.c.at)).scalars().all().count(0.0) == 0
    assert connection.execute(sa.select(sa.func.count()).select_from(found)).scalar_one() >= 1


def test_triggers_are_back_after_a_deletion(database):
  with database.write() as connection, schema.without_triggers(connection):
    connection.execute(schema.submissions.delete())
  with pytest.raises(sa.exc.DatabaseError, match="append-only"), database.write() as connection:
    connection.execute(schema.audit.delete())


@pytest.mark.sqlite
def test_what_is_committed_is_on_disk(database):
  """Write-ahead log, and a wait for the disk with every transaction."""
  with database.write() as connection:
    pragma = lambda name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
    assert (pragma("journal_mode"), pragma("synchronous"), pragma("foreign_keys")) == ("wal", 2, 1)


@pytest.mark.sqlite
def test_only_the_owner_may_read_the_file(database, tmp_path):
  for name in os.listdir(tmp_path):
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


def test_readers_do_not_wait_for_a_writer(database):
  with database.write() as writing, database.read() as reading:
    writing.execute(schema.users.update().values(role="admin"))
    assert reading.execute(sa.select(schema.users.c.role)).scalar_one() == "labeler"


@pytest.mark.sqlite
def test_what_is_no_project_is_refused(tmp_path):
  with pytest.raises(UserError, match="is no labeling project yet"):
    schema.open_(str(tmp_path))
  (tmp_path / "labels.sqlite").write_bytes(b"no database at all, but long enough to be looked at")
  with pytest.raises(UserError, match="cannot be opened: .*not a database"):
    schema.open_(str(tmp_path))
  with pytest.raises(UserError, match="cannot write"):
    schema.create(str(tmp_path / "labels.sqlite" / "p"))


def test_an_empty_database_is_no_project(tmp_path):
  """Of PostgreSQL; SQLite lacks the file."""
  with pytest.raises(UserError, match="no labeling project"):
    label_records.rows(str(tmp_path), "comparisons", "all")


def test_twenty_people_at_once(tmp_path):
  """Each gets an item of its own, twice the same, and what they send is there, until one is deleted."""
  names = [(f"p{i}", "labeler") for i in range(20)]
  database = app.make_project(tmp_path, [app.item(f"{i}") for i in range(20)], names)
  people, got = [app.user(database, name) for name, _ in names], []
  threads = [
    threading.Thread(target=lambda one=one: got.append(work.next_item(database, one, 0.0)))
    for one in people * 2
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(got) == sorted([*range(1, 21)] * 2)
  for one in people:
    app.submit(database, one, work.next_item(database, one, 0.0))
  assert len(label_records.rows(str(tmp_path), "comparisons", "all")) == 20
  assert privacy.delete(database, "p1", 1.0)["submissions"] == 1
  assert len(label_records.rows(str(tmp_path), "comparisons", "all")) == 19
  with pytest.raises(sa.exc.DatabaseError, match="append-only"), database.write() as connection:
    connection.execute(schema.audit.update().values(at=0.0))


@pytest.mark.sqlite
def test_what_nobody_uses_any_more_has_no_connection(tmp_path):
  found = schema.create(str(tmp_path))
  with found.read() as connection:
    inner = connection.connection.dbapi_connection
  inner.execute("SELECT 1")  # it waits for its next use
  del connection, found
  with pytest.raises(sqlite3.ProgrammingError, match="closed"):
    inner.execute("SELECT 1")


def test_numbers_are_never_given_twice(database, tmp_path):
  """The last person, and with that the last submission, is deleted; the next ones have numbers of their own."""
  ann = app.user(database, "ann")
  privacy.delete(database, "ann", 3.0)
  again = accounts.add(database, "bea", "labeler", None, 4.0)
  assert again > ann.id
  bea = app.user(database, "bea")
  app.submit(database, bea, work.next_item(database, bea, 5.0))
  assert not label_records.rows(str(tmp_path), "comparisons", "all", until=1)
  assert label_records.newest(str(tmp_path)) == (2, 1)
