"""What a run with later rounds reads of a project: what was there when it began."""

import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import label_records, readers, sources
from instructjax.labels import projects, work
from instructjax.stages import pinned
from tests import micro
from tests.labels import app

ENDS = {"until": 3, "items": 4, "is_of_sweep": False}
PEOPLE = (("ann", "labeler"), ("bea", "labeler"))


def config(source, rounds=2, **more):
  return micro.config("ppo_ptx", {}, data__comparisons=source, collect__rounds=rounds, **more)


@pytest.fixture
def project(tmp_path):
  """(place, database) of a project in which ann has ranked the only item."""
  place = str(tmp_path / "p")
  database = app.make_project(place, [app.item("one", wanted=2)], PEOPLE)
  rank(database, "ann")
  return place, database


def rank(database, name):
  person = app.user(database, name)
  app.submit(database, person, work.next_item(database, person, 1.0))


def test_what_comes_later_does_not_count(tmp_path, project, capsys):
  place, database = project
  cfg, run = config(f"labels:{place}", data__prompts=f"labels:{place}"), tmp_path / "run"
  pinned.pin(cfg, run)
  spec = pinned.spec(cfg, run, "comparisons")
  assert spec == f"labels:{place}?until=1&items=1"
  before = sources.how(spec)
  rank(database, "bea")
  projects.add(database, [app.item("two")], 5.0)
  (run / "rm").mkdir()
  pinned.pin(cfg, run)  # a run that goes on
  assert "up to submission 1; there are newer ones, up to 2" in " ".join(
    capsys.readouterr().out.split()
  )
  assert pinned.spec(cfg, run, "comparisons") == spec and sources.how(spec) == before
  assert sources.how(f"labels:{place}") != before
  kept = label_records.rows(place, "prompts", "all", 1, last_item=1)
  assert [row["prompt"] for _, row in kept] == ["one"]
  assert pinned.spec(cfg, run, "prompts") == spec
  # Also where the same workdir is asked for one round again.
  assert pinned.spec(config(f"labels:{place}", 1), run, "comparisons") == spec


def test_what_the_user_says_counts(tmp_path, project):
  place, _ = project
  cfg = config(f"labels:{place}?until=7&cohort=heldout")
  pinned.pin(cfg, tmp_path / "run")
  found = pinned.spec(cfg, tmp_path / "run", "comparisons")
  assert readers.labeling_project(found) == (
    place,
    {"until": "7", "items": "1", "cohort": "heldout"},
  )


def test_a_start_that_read_nothing_does_not_count(tmp_path, project):
  """A mistake stopped it; until the next, people have gone on."""
  place, database = project
  cfg, run = config(f"labels:{place}"), tmp_path / "run"
  pinned.pin(cfg, run)
  rank(database, "bea")
  (run / "pretrain").mkdir()  # which reads no labels
  pinned.pin(cfg, run)
  assert pinned.spec(cfg, run, "comparisons") == f"labels:{place}?until=2&items=1"


def test_all_points_of_a_sweep_read_the_same(tmp_path, project):
  place, database = project
  cfg = config(f"labels:{place}")
  pinned.pin(cfg, tmp_path)
  projects.add(database, [app.item("of the first point's round")], 5.0)
  pinned.share(tmp_path, tmp_path / "point")
  pinned.pin(cfg, tmp_path / "point")
  assert pinned.spec(cfg, tmp_path / "point", "comparisons").endswith("?until=1&items=1")
  pinned.pin(cfg, tmp_path, is_begun=True)  # the sweep goes on
  assert pinned.spec(cfg, tmp_path, "comparisons").endswith("?until=1&items=1")
  # What a point has kept itself stays.
  (tmp_path / "point" / pinned.FILE).write_text(json.dumps({place: ENDS}))
  pinned.share(tmp_path, tmp_path / "point")
  assert pinned.spec(cfg, tmp_path / "point", "comparisons").endswith("?until=3&items=4")


def test_other_runs_read_as_before(tmp_path, project):
  place, _ = project
  for cfg in (config(f"labels:{place}", 1), config("demo:", 2, data__prompts="demo:")):
    pinned.pin(cfg, tmp_path / "run")
    assert pinned.spec(cfg, tmp_path / "run", "comparisons") == cfg.data.comparisons
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "content",
  [
    "",
    "[]",
    '{"p": 3}',
    '{"p": {"until": "1"}}',
    '{"p": {"until": 1, "items": 2, "is_of_sweep": 0}}',
  ],
)
def test_a_damaged_file_is_no_reason_to_read_everything(tmp_path, content):
  (tmp_path / pinned.FILE).write_text(content)
  with pytest.raises(UserError, match=r"cannot read .*labels.json: .* Delete"):
    pinned.spec(config("labels:p"), tmp_path, "comparisons")
  (tmp_path / pinned.FILE).write_text(json.dumps({"q": ENDS}))
  assert pinned.spec(config("labels:p"), tmp_path, "comparisons") == "labels:p"
