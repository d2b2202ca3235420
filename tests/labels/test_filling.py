"""Rankings from elsewhere and simulated labelers' become a project's, and training reads them from there."""

import collections
import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.records import Chat
from instructjax.labels import accounts, exchange, filling, judgements, projects, schema, work
from tests.labels import app


def load(spec, kind="comparisons", split="all"):
  return sources.load(spec, kind, split, seed=0, validation_fraction=0.05, on_bad_record="raise")


def write(path, *rows) -> str:
  exchange.write_lines(path, rows)
  return f"jsonl:{path}"


def test_rankings_of_several_annotators_become_one_item(tmp_path):
  row = {"prompt": "p", "responses": ["a", "b", "b"], "ranks": [1, 2, 3], "labeler": "ann lee"}
  spec = write(
    tmp_path / "rows.jsonl",
    row,
    row | {"ranks": [1, 1, 2], "labeler": "bea"},
    row | {"prompt": "q", "labeler": None},
    row | {"prompt": "r", "labeler": "@cy"},
  )
  database = app.make_project(tmp_path / "p", people=())
  assert filling.bring_in(database, spec, "comparisons", 0.0) == (3, 4)
  found = load(f"labels:{tmp_path}/p")
  as_pairs = lambda one: (one.prompt, one.labeler, sorted(zip(one.responses, one.ranks)))
  assert [as_pairs(one) for one in found] == [
    ("p", "ann_lee", [("a", 1), ("b", 2), ("b", 3)]),
    ("p", "bea", [("a", 1), ("b", 1), ("b", 2)]),
    ("q", "imported", [("a", 1), ("b", 2), ("b", 3)]),
    ("r", "_cy", [("a", 1), ("b", 2), ("b", 3)]),
  ]
  assert accounts.sign_in(database, "bea", "", "here", 0.0) is None
  with pytest.raises(UserError, match="ann_lee has ranked the same answers twice"):
    filling.bring_in(database, write(tmp_path / "twice.jsonl", row, row), "comparisons", 0.0)
  many = {"prompt": "p", "responses": list("abcdefghij"), "ranks": list(range(1, 11))}
  with pytest.raises(UserError, match="many.jsonl.*2.*: it ranks 10 answers, .* at most 9"):
    filling.bring_in(database, write(tmp_path / "many.jsonl", row, many), "comparisons", 0.0)
  with pytest.raises(UserError, match="--from='demo:' must name rankings that lie somewhere"):
    filling.bring_in(database, "demo:", "comparisons", 0.0)
  with pytest.raises(UserError, match="--from='demo:' must name records of people"):
    filling.bring_in(database, "demo:", "demonstrations", 0.0)
  with pytest.raises(UserError, match="--kind must be comparisons or demonstrations"):
    filling.bring_in(database, spec, "prompts", 0.0)


ROW = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}


def test_several_rankings_without_a_labeler_are_by_several_people(tmp_path):
  """None of them has the name of one who has a name."""
  rows = [ROW, ROW, ROW | {"labeler": "imported_2"}, ROW | {"prompt": "q"}, ROW | {"labeler": ""}]
  database = app.make_project(tmp_path / "p", people=())
  spec = write(tmp_path / "rows.jsonl", *rows)
  assert filling.bring_in(database, spec, "comparisons", 0.0) == (2, 5)
  found = [(one.prompt, one.labeler) for one in load(f"labels:{tmp_path}/p")]
  names = ["imported", "imported_3", "imported_2", "imported_4"]
  assert found == [*(("p", name) for name in names), ("q", "imported")]
  # Another file may hold more of them.
  assert filling.bring_in(database, spec, "comparisons", 0.0) == (2, 5)


@pytest.mark.parametrize(
  ("one", "other", "account"),
  [
    ("ann lee", "ann#lee", "ann_lee"),
    ("ann_lee", "ann lee", "ann_lee"),
    ("x" * 80 + "1", "x" * 80 + "2", "x" * 80),
    ("u7", "_u7", "_u7"),
  ],
)
def test_two_labelers_do_not_become_one_person(tmp_path, one, other, account):
  rows = [ROW | {"labeler": one}, ROW | {"prompt": "q", "labeler": other}]
  database = app.make_project(tmp_path / "p", people=())
  with pytest.raises(UserError, match=f"rows.jsonl.*2.* would both have the account {account}: re"):
    filling.bring_in(database, write(tmp_path / "rows.jsonl", *rows), "comparisons", 0.0)
  spec = write(tmp_path / "one.jsonl", rows[0])
  filling.bring_in(database, spec, "comparisons", 0.0)
  filling.bring_in(database, spec, "comparisons", 1.0)  # the same person, in a second file
  assert [person.name for person in accounts.everybody(database)] == [account]


def test_what_is_imported_is_not_credited_to_another_of_the_name(tmp_path):
  database = app.make_project(tmp_path / "p")  # with ann, who signs in
  accounts.add(database, "hal", "labeler", None, 0.0, "heldout")
  accounts.set_active(database, "ann", False, 0.0)
  said = "has the name of a person of the project who"
  for name, why in (("ann", "signs in"), ("hal", "is of the cohort heldout")):
    spec = write(tmp_path / "rows.jsonl", ROW | {"labeler": "bea"}, ROW | {"labeler": name})
    with pytest.raises(UserError, match=f"labeler {name} {said} {why}, .*: give the labeler anoth"):
      filling.bring_in(database, spec, "comparisons", 0.0)
  with database.read() as connection:
    assert not connection.execute(schema.items.select()).all()


def test_demonstrations_are_brought_in(tmp_path):
  spec = write(tmp_path / "d.jsonl", *[{"prompt": "p", "response": text} for text in "ab"])
  database = app.make_project(tmp_path / "p", people=())
  assert filling.bring_in(database, spec, "demonstrations", 0.0) == (2, 2)
  found = load(f"labels:{tmp_path}/p", "demonstrations")
  assert [one.response for one in found] == ["a", "b"]


@pytest.fixture(scope="module")
def prompts():
  return [
    one.prompt
    for one in sources.load(
      "demo:", "prompts", "train", seed=0, validation_fraction=0.05, on_bad_record="raise"
    )
  ][:30]


@pytest.fixture
def simulated(tmp_path, prompts):
  """Thirty prompts of the default task, with three answers each, that two labelers are to rank."""
  texts = ("praise the lord for he is good.", "the the the", "i will sing of his mercy forever.")
  answers = tuple((text, "m") for text in texts)
  database = app.make_project(tmp_path / "p", people=())
  projects.change(database, {"held_out": "0.3"})
  projects.add(database, [app.item(prompt, answers, wanted=2) for prompt in prompts], 0.0)
  return database


def test_simulated_labelers_fill_a_project(simulated, tmp_path, prompts):
  """The first ranking of each prompt is the one that the stage `collect` would get."""
  assert filling.simulate(simulated, "demo:", "train", 0, 0.0) == (60, 0)
  assert filling.simulate(simulated, "demo:", "train", 0, 0.0) == (
    0,
    0,
  )  # nothing is wanted any more
  found = load(f"labels:{tmp_path}/p")
  counts = collections.Counter(one.prompt for one in found)
  assert set(counts.values()) == {2} and set(counts) == set(prompts)
  assert len({(one.prompt, one.labeler) for one in found}) == 60
  asked = [(one.prompt, one.responses) for one in found[:30]]
  own = sources.require_simulation("demo:").collect_rankings(asked, "train", 0)
  assert [(one.ranks, one.labeler) for one in found[:30]] == [
    (one.ranks, one.labeler) for one in own
  ]
  sides = {
    split: len(load(f"labels:{tmp_path}/p", split=split)) for split in ("train", "validation")
  }
  assert sum(sides.values()) == 60 and all(sides.values())


def test_what_is_simulated_is_not_credited_to_another_of_the_name(simulated, prompts):
  asked = [(prompts[0], ["a", "b"])]
  (first,) = sources.require_simulation("demo:").collect_rankings(asked, "train", 0)
  accounts.add(simulated, first.labeler, "labeler", app.PASSWORD, 0.0)
  said = (
    f"labeler {first.labeler} has the name of a person of the project who signs in, .*: simulate in"
  )
  with pytest.raises(UserError, match=said):
    filling.simulate(simulated, "demo:", "train", 0, 0.0)


def test_what_somebody_has_skipped_is_wanted_still(simulated):
  accounts.add(simulated, "ann", "labeler", None, 0.0)
  ann = app.user(simulated, "ann")
  number = work.next_item(simulated, ann, 0.0)
  work.skip(simulated, ann, work.task(simulated, ann, number), work.REASONS[0], 1.0)
  assert filling.simulate(simulated, "demo:", "train", 0, 2.0) == (60, 0)


def test_heldout_labelers_rank_the_heldout_prompts_once_more(simulated, tmp_path):
  count, _ = filling.simulate(simulated, "demo:", "heldout", 0, 0.0)
  assert filling.simulate(simulated, "demo:", "train", 0, 0.0) == (60, 0)  # as many as without
  counts, _ = exchange.export(str(tmp_path / "p"), "comparisons", str(tmp_path / "out"))
  assert counts["heldout.jsonl"] == count == counts["validation.jsonl"] / 2
  rows = [json.loads(line) for line in (tmp_path / "out/heldout.jsonl").read_text().splitlines()]
  assert {row["labeler"].partition("_")[0] for row in rows} == {"heldout"}


def test_what_simulated_labelers_leave_open(simulated, prompts):
  """No yes/no question is answered, so that none counts as a no; and more than there are of them cannot rank."""
  projects.add(simulated, [app.item(prompts[0], wanted=1000)], 0.0)
  _, left = filling.simulate(simulated, "demo:", "train", 0, 0.0)
  with simulated.read() as connection:
    found = judgements.read(connection)
  assert all(one.ratings.keys() == one.ranks.keys() and not one.sensitive for one in found)
  assert left == 1000 - sum(one.item_id == 31 for one in found) > 900


def test_only_a_simulated_tasks_labelers_can_be_simulated(simulated):
  with pytest.raises(UserError, match="simulated labelers know only"):
    filling.simulate(simulated, "jsonl:x", "train", 0, 0.0)
  with pytest.raises(UserError, match="--simulation=conversation: must be demo:"):
    filling.simulate(simulated, "conversation:", "train", 0, 0.0)
  (chat,) = projects.add(simulated, [app.item(Chat((("user", "Hi."),)))], 0.0)
  with pytest.raises(UserError, match=f"item {chat} is of a chat"):
    filling.simulate(simulated, "demo:", "train", 0, 0.0)


def test_an_import_that_fails_leaves_nothing(tmp_path, monkeypatch):
  """Also not the accounts of its labelers, nor the items."""
  rows = [{"prompt": p, "responses": ["a", "b"], "ranks": [1, 2], "labeler": p} for p in "xy"]
  (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  database = schema.create(str(tmp_path / "p"))
  dumped = filling.json.dumps

  def fail(value, **more):
    if "answers" in value:
      raise RuntimeError("the power is gone")
    return dumped(value, **more)

  monkeypatch.setattr(filling.json, "dumps", fail)
  with pytest.raises(RuntimeError, match="power"):
    filling.bring_in(database, f"jsonl:{tmp_path}/r.jsonl", "comparisons", 1.0)
  monkeypatch.undo()
  with database.read() as connection:
    for table in ("items", "answers", "users", "assignments", "submissions", "audit"):
      assert not connection.execute(schema.metadata.tables[table].select()).all(), table
  assert filling.bring_in(database, f"jsonl:{tmp_path}/r.jsonl", "comparisons", 1.0) == (2, 2)
