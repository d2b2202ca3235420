"""Trainings: registered once, with the agreement as it was, and drawn where they belong."""

import dataclasses

import pytest

from instructjax.labels import projects, trainings, work
from instructjax.labels.trainings import Training
from tests.labels import app

NEW = Training("a" * 64, "run/rm", 0.7, 0.64, 0.76, 90, 3000.0)
PEOPLE = (("ann", "labeler"), ("bea", "labeler"), ("rob", "researcher"))
PAIR = (("good", "model-one"), ("bad", "model-two"))


@pytest.fixture
def database(tmp_path):
  """ann and bea agree on item 1, at times 1000 and 2000, and disagree on item 2, at 3000 and 4000."""
  found = app.make_project(tmp_path, [app.item(t, PAIR, wanted=2) for t in ("one", "two")], PEOPLE)
  at = 1000.0
  for best in ({"ann": "good", "bea": "good"}, {"ann": "good", "bea": "bad"}):
    for name, chosen in best.items():
      person = app.user(found, name)
      number = work.next_item(found, person, 0.0)
      order = work.task(found, person, number).answers
      app.submit(found, person, number, [1 if a.text == chosen else 2 for a in order], now=at)
      at += 1000.0
  return found


@pytest.mark.parametrize(
  ("until", "before", "mean", "pairs"),
  [(0, 5000.0, 0.5, 2), (0, 4000.0, 1.0, 1), (3, 5000.0, 1.0, 1), (1, 5000.0, None, 0)],
)
def test_the_agreement_is_that_of_the_training(database, until, before, mean, pairs):
  agree, is_new = trainings.register(database, NEW, until, before, 9000.0)
  assert (agree.mean, agree.count, is_new) == (mean, pairs, True)
  # Registered once more, it is the same, whatever was ranked since.
  assert trainings.register(database, NEW, 0, 9999.0, 9001.0) == (agree, False)
  with database.read() as connection:
    assert trainings.read(connection) == [(NEW, agree)]


def test_rankings_of_how_toxic_answers_are_do_not_count(database):
  """A reward model does not learn from them."""
  before, _ = trainings.register(database, NEW, 0, 5000.0, 9000.0)
  projects.add(database, [app.item("three", PAIR, kind="toxicity", wanted=2)], 0.0)
  for name in ("ann", "bea"):
    person = app.user(database, name)
    number = work.next_item(database, person, 0.0)
    app.submit(database, person, number, [1, 2], now=4500.0)
  other = dataclasses.replace(NEW, identity="b" * 64)
  assert trainings.register(database, other, 0, 5000.0, 9000.0) == (before, True)


def test_the_page(database):
  trainings.register(database, NEW, 3, 0.0, 9000.0)
  html = app.browser(database, "rob").get("/trainings").text
  assert "run/rm</td>" in html and "70% <span" in html and "64% to 76%" in html
  # 40% is at the bottom, 190 below 100%: .7 is half way up, 100% of the labelers' pairs at the top.
  assert 'cx="320.0" cy="105' in html and '<rect class="people" x="329.0" y="5.0"' in html
  assert app.browser(database, "ann").get("/trainings").status_code == 404


def test_marks():
  agree = trainings.Share(None, 0.0, 1.0, 0, 0)
  accuracy, people = trainings.marks([(NEW, agree), (NEW, agree)])
  assert [mark.x for mark in accuracy] == [0.25, 0.75] and people == []
  assert accuracy[0].y == pytest.approx(0.5) and accuracy[0].low == pytest.approx(0.4)
  assert trainings.height(0.2) == 0.0 and trainings.height(1.2) == 1.0
