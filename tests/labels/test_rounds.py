"""Batches: put once, counted by who may still rank them, and closed."""

import pytest

from instructjax.core.errors import UserError
from instructjax.labels import accounts, projects, rounds, work
from instructjax.labels.rounds import State
from tests.labels import app

PEOPLE = (("ann", "labeler"), ("bea", "labeler"))


@pytest.fixture
def database(tmp_path):
  """Two items of a batch, each wanted of one."""
  found = app.make_project(tmp_path, [], PEOPLE)
  new = [app.item(prompt, batch="b", split="validation") for prompt in ("one", "two")]
  assert rounds.put(found, new, 1.0, 0)
  assert not rounds.put(found, new, 2.0, 0)
  return found


def state(database):
  return rounds.state(database, "b")


def test_rankings_are_counted(database):
  assert state(database) == State(2, 0, 2, 0)
  ann = app.user(database, "ann")
  app.submit(database, ann, work.next_item(database, ann, 1.0))
  assert state(database) == State(2, 1, 1, 0)
  rounds.want(database, "b", 2)
  assert state(database) == State(2, 1, 3, 0)
  with database.read() as connection:
    assert rounds.states(connection) == {"b": State(2, 1, 3, 0)}


def test_held_out_labelers_are_not_waited_for_nor_counted(database):
  accounts.add(database, "hal", "labeler", None, 1.0, "heldout")
  hal = app.user(database, "hal")
  app.submit(database, hal, work.next_item(database, hal, 1.0))
  assert state(database) == State(2, 0, 2, 0)


def skip(database, person):
  number = work.next_item(database, person, 1.0)
  work.skip(database, person, work.task(database, person, number), work.REASONS[0], 2.0)


def test_what_everybody_has_skipped_is_given_up(database):
  ann, bea = (app.user(database, name) for name in ("ann", "bea"))
  # A researcher who has ranked it is none of those who are left.
  accounts.add(database, "rob", "researcher", "correct horse", 1.0)
  rounds.want(database, "b", 2)
  work.take(database, app.user(database, "rob"), 1, 1.0)
  app.submit(database, app.user(database, "rob"), 1)
  skip(database, ann)
  assert state(database) == State(2, 1, 3, 0)  # bea may rank it
  rounds.want(database, "b", 1)
  assert state(database) == State(2, 1, 1, 0)


def test_what_is_given_up_is_asked_again_when_people_come_back(database):
  ann, bea = (app.user(database, name) for name in ("ann", "bea"))
  accounts.add(database, "imported", "labeler", None, 1.0)  # who cannot sign in to rank any
  skip(database, ann)
  assert state(database) == State(2, 0, 2, 0)
  accounts.set_active(database, "bea", False, 3.0)
  assert state(database) == State(2, 0, 1, 1)
  accounts.set_active(database, "bea", True, 4.0)
  skip(database, bea)
  assert state(database) == State(2, 0, 1, 1)


def test_a_batch_that_is_closed_is_asked_of_nobody(database):
  ann, bea = (app.user(database, name) for name in ("ann", "bea"))
  app.submit(database, ann, work.next_item(database, ann, 1.0))
  assert rounds.close(database, "b", 5.0) == 1
  assert work.next_item(database, bea, 6.0) is None
  rounds.want(database, "b", 3)  # stays closed
  assert state(database) == State(2, 1, 0, 0)
  (other,) = projects.add(database, [app.item("of no batch")], 6.0)
  for name in ("c", ""):  # the latter where the flag is forgotten
    with pytest.raises(UserError, match=f"--batch='{name}' must be one of the project's: b"):
      rounds.close(database, name, 7.0)
  assert work.next_item(database, bea, 8.0) == other
