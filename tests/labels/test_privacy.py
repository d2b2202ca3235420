"""One person's data, and that nothing of it is left after a deletion."""

import pytest
import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.labels import accounts, judgements, privacy, projects, prompts, schema, work
from tests.labels import app


@pytest.fixture
def database(tmp_path):
  people = (("ann", "labeler"), ("bea", "labeler"))
  found = app.make_project(tmp_path, [app.item("secret of ann", author="ann", wanted=2)], people)
  for name in ("ann", "bea"):
    person = app.user(found, name)
    prompts.keep(found, person, f"written by {name}", 0.0)
    number = work.next_item(found, person, 0.0)
    ids = app.answers_of(found, number)
    app.submit(found, person, number, **{f"{min(ids.values())}.note": f"a note of {name}"})
    accounts.sign_in(found, name, app.PASSWORD, "here", 0.0)
    accounts.sign_in(found, name, "wrong", "here", 0.0)
  return found


def test_everything_of_a_person(database):
  judgements.grade(database, 1, app.user(database, "bea").id, 6, 0.0)  # ann's
  found = privacy.data_of(database, "ann")
  assert [row["name"] for row in found["person"]] == ["ann"]
  counts = {name: len(rows) for name, rows in found.items()}
  assert (
    counts["submissions"] == counts["assignments"] == counts["attempts"] == counts["items"] == 1
  )
  assert [row["text"] for row in found["prompts"]] == ["written by ann"]
  assert [row["grade"] for row in found["graded"]] == [6] and not found["grades"]
  assert "a note of ann" in found["submissions"][0]["payload"]
  text = repr(found)
  assert "a note of bea" not in text and "$argon2" not in text and "'token'" not in text
  with pytest.raises(UserError, match="no person named 'zoe'"):
    privacy.data_of(database, "zoe")


def author(database, number):
  with database.read() as connection:
    return prompts.author(connection, number)


def test_what_a_user_of_another_project_wrote_is_nobodys_here(database, tmp_path):
  """Its pool is added here, where another person has the same number."""
  other = app.make_project(tmp_path / "other", [], (("una", "user"),))
  prompts.keep(other, app.user(other, "una"), "secret of una", 0.0)
  (row,) = prompts.records(other)
  assert app.user(other, "una").id == app.user(database, "ann").id == 1
  projects.add(database, [app.item(row["prompt"], author=row["user"])], 1.0)
  assert "secret of una" not in repr(privacy.data_of(database, "ann"))
  privacy.delete(database, "ann", 9.0)
  with database.read() as connection:
    authors = connection.execute(sa.select(schema.items.c.author)).scalars().all()
  assert sorted(authors) == ["", row["user"]]


def test_nothing_is_left_of_a_deleted_person(database):
  number = app.user(database, "ann").id
  projects.add(database, [app.item("of the playground", author=author(database, number))], 1.0)
  counts = privacy.delete(database, "ann", 9.0)
  assert counts["submissions"] == 1
  with database.read() as connection:
    for table in schema.metadata.tables.values():
      if "user_id" in table.c:
        rows = connection.execute(sa.select(table).where(table.c.user_id == number)).all()
        assert not rows, table.name
    assert connection.execute(sa.select(schema.items.c.author)).scalars().all() == ["", ""]
    notes = connection.execute(sa.select(schema.submissions.c.payload)).scalars().all()
    last = connection.execute(sa.select(schema.audit.c.action)).scalars().all()[-1]
  assert len(notes) == 1 and "a note of bea" in notes[0] and last == "person deleted"
  with pytest.raises(sa.exc.DatabaseError, match="append-only"), database.write() as connection:
    connection.execute(schema.submissions.delete())


def test_rows_come_by_their_numbers(database):
  """Where PostgreSQL has changed one, it lies last."""
  projects.add(database, [app.item(f"more {i}", author="ann") for i in range(2)], 1.0)
  with database.write() as connection:
    connection.execute(schema.items.update().where(schema.items.c.id == 1).values(wanted=3))
  assert [row["id"] for row in privacy.data_of(database, "ann")["items"]] == [1, 2, 3]


@pytest.mark.sqlite
def test_nothing_is_left_in_the_file_either(database, tmp_path):
  privacy.delete(database, "ann", 9.0)
  data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
  assert b"a note of ann" not in data and b"a note of bea" in data
