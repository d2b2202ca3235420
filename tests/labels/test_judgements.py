"""What the researcher's pages count: the newest submission of each person to each item."""

import pytest

from instructjax.labels import judgements, work
from tests.labels import app


@pytest.fixture
def database(tmp_path):
  found = app.make_project(
    tmp_path, [app.item(), app.item("d", (), "demonstration"), app.item("x")]
  )
  ann = app.user(found, "ann")
  for _ in range(2):
    app.submit(found, ann, work.next_item(found, ann, 0.0), now=1000.0)
  work.skip(found, ann, work.task(found, ann, work.next_item(found, ann, 0.0)), "why", 0.0)
  app.submit(found, ann, 1, (2, 1, 3))  # a revision
  return found


def test_a_revision_counts_once(database):
  with database.read() as connection:
    found = judgements.read(connection)
    (pace,) = judgements.paces(connection)
  assert [one.item_id for one in found] == [2, 1]
  demonstration, ranking = found
  assert demonstration.ranks == {} and demonstration.ratings == {} and demonstration.sensitive == {}
  assert sorted(ranking.ranks.values()) == [1, 2, 3] and set(ranking.ratings.values()) == {7}
  assert judgements.ranked(found) == {1: {"ann": ranking.ranks}}
  assert all(one == {"ann": 7} for one in judgements.rated(found).values())
  assert (pace.done, pace.skipped, pace.hours) == (2, 1, pytest.approx(3 / 3600))
  sizes = judgements.split_sizes(found)
  assert sum(sizes["SFT"].values()) == sum(sizes["RM"].values()) == 1


def test_grades_and_the_survey_replace_earlier_ones(database):
  ann = app.user(database, "ann")
  for value in (3, 5):
    judgements.grade(database, 2, ann.id, value, 0.0)
    judgements.say(database, ann.id, {"Age": value % 3}, 0.0)
  with database.read() as connection:
    assert judgements.grades_by_submission(connection) == {2: [5]}
    assert judgements.self_assessed(connection) == {"ann": {"Age": 2}}
