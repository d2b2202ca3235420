"""A project's items: what is allowed, on which side of the split they fall, and in which order answers are kept."""

import pytest

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.records import Chat, Prompt
from instructjax.labels import projects, schema, work
from tests.labels import app

CHAT = Chat((("system", "Be brief."), ("user", "Hi.")))


@pytest.mark.parametrize("prompt", ["a", "b", "c", "d", CHAT])
def test_the_split_is_that_of_the_same_prompt_in_a_file(prompt):
  is_held_out = sources._is_held_out(Prompt(prompt), 0.5)
  item = projects.Item("demonstration", prompt)
  assert projects.split_of(item, 0.5) == ("validation" if is_held_out else "train")


def test_a_customers_prompts_are_on_one_side():
  sides = [
    {
      projects.split_of(projects.Item("demonstration", f"{i}", author=f"user {user}"), 0.5)
      for i in range(20)
    }
    for user in range(10)
  ]
  assert all(len(side) == 1 for side in sides) and len(set.union(*sides)) == 2


def test_equal_prompts_are_on_one_side_whoever_wrote_them(tmp_path):
  database = app.make_project(tmp_path)
  projects.change(database, {"held_out": "0.5"})
  for author in "abcdefgh":
    projects.add(database, [app.item("Hi.", author=author), app.item(author, author=author)], 0.0)
  with database.read() as connection:
    rows = connection.execute(schema.items.select()).all()
  assert len({row.split for row in rows if row.prompt == '"Hi."'}) == 1
  assert len({row.split for row in rows if row.prompt != '"Hi."'}) == 2


def test_the_order_of_answers_tells_nothing_of_their_origin(tmp_path):
  """Over many items, the first place belongs to the first model about half of the time."""
  answers = (("a", "one"), ("b", "two"))
  database = app.make_project(tmp_path, [app.item(f"{i}", answers) for i in range(200)])
  with database.read() as connection:
    rows = connection.execute(schema.answers.select().order_by(schema.answers.c.id)).all()
  first = [row.origin for row in rows if row.position == 0]
  assert 70 < first.count("one") < 130
  assert [row.id for row in rows if row.position == 0] == list(range(1, 400, 2))


@pytest.mark.parametrize(
  ("item", "message"),
  [
    (app.item(answers=(("a", "m"),)), "needs 2 to 9 answers, got 1"),
    (app.item(answers=(("a", "m"),) * 10), "needs 2 to 9 answers, got 10"),
    (app.item(kind="demonstration"), "has no answers, got 3"),
    (app.item(kind="poem"), "kind 'poem' must be one of"),
    (app.item(source="dream"), "source 'dream' must be one of"),
    (app.item(wanted=0), "wanted=0 must be at least 1"),
    (app.item(author="x" * 81), "must have at most 80 letters"),
  ],
)
def test_bad_items_are_refused_and_nothing_is_added(tmp_path, item, message):
  database = app.make_project(tmp_path)
  with pytest.raises(UserError, match=message):
    projects.add(database, [app.item(), item], 0.0)
  with database.read() as connection:
    assert not connection.execute(schema.items.select()).all()


def test_the_share_held_out_is_settled_with_the_first_item(tmp_path):
  database = app.make_project(tmp_path)
  projects.change(database, {"held_out": "0.25", "title": "T"})
  assert projects.settings(database) == projects.DEFAULTS | {"held_out": "0.25", "title": "T"}
  projects.add(database, [app.item()], 0.0)
  with pytest.raises(UserError, match="before there are items"):
    projects.change(database, {"held_out": "0.5"})


def test_an_answer_with_a_nul_can_be_trained_on(tmp_path):
  database = app.make_project(tmp_path, [app.item(answers=(("a\0b", "m"), ("c", "m")))])
  ann = app.user(database, "ann")
  app.submit(database, ann, work.next_item(database, ann, 1.0))
  (one,) = sources.load(
    f"labels:{tmp_path}",
    "comparisons",
    "all",
    seed=0,
    validation_fraction=0.5,
    on_bad_record="raise",
  )
  assert sorted(one.responses) == ["a\ufffdb", "c"]
