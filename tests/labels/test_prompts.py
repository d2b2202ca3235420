"""The pool of users' prompts: no two that begin alike, no more than 200 of a user, split by user."""

from instructjax.labels import projects, prompts
from tests.labels import app

PEOPLE = (("una", "user"), ("ugo", "user"))


def test_no_two_begin_alike():
  long = "Write a poem about the sea, and let each line end in the word “wave”, please: "
  assert prompts.prefix(long + "one") == prompts.prefix("  WRITE a\npoem" + long[12:] + "two")
  assert len(prompts.prefix(long)) == prompts.LONG
  assert prompts.prefix("Write a poem") != prompts.prefix("Write a poem about the sea")
  assert prompts.prefix("A\u00a0b") == prompts.prefix("a b")  # a space that does not break


def test_the_pool(tmp_path, monkeypatch):
  database = app.make_project(tmp_path, [], PEOPLE)
  una, ugo = (app.user(database, name) for name, _ in PEOPLE)
  monkeypatch.setattr(prompts, "MOST", 2)
  said = [prompts.keep(database, una, text, 1.0) for text in ("one", "ONE ", "two", "three")]
  assert said == ["kept", "known", "kept", "full"]
  assert prompts.keep(database, ugo, "two", 2.0) == "known"  # whoever has written it
  assert prompts.keep(database, ugo, "three", 2.0) == "kept"
  rows = [row.id for row in prompts.of_user(database, una)]
  assert [row.text for row in prompts.of_user(database, una)] == ["two", "one"]
  assert not prompts.forget(database, ugo, rows[0], 3.0)  # it is not his
  assert prompts.forget(database, una, rows[0], 3.0)
  assert prompts.keep(database, una, "two", 4.0) == "kept"
  with database.read() as connection:
    names = {prompts.author(connection, one.id) for one in (una, ugo)}
  found = prompts.records(database)
  assert {row["user"] for row in found} == names and len(found) == 3
  # All prompts of a user fall on one side of a project's split, with those that an earlier version called `u1`.
  for row in found:
    sides = {
      projects.split_of(projects.Item("ranking", text, author=author), 0.5)
      for text in ("a", "b", "c", "d", "e")
      for author in (row["user"], row["user"].partition(":")[0])
    }
    assert len(sides) == 1
