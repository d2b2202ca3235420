"""Who gets which item, drafts, and that what is sent is taken once."""

import threading

import pytest
import sqlalchemy as sa

from instructjax.labels import accounts, projects, schema, work
from tests.labels import app

DAY = 24 * 3600.0
PEOPLE = (("ann", "labeler"), ("bea", "labeler"), ("rob", "researcher"))


@pytest.fixture
def database(tmp_path):
  items = [app.item("one"), app.item("two", wanted=2), app.item("test", is_screening=True)]
  return app.make_project(tmp_path, items, PEOPLE)


def work_off(database, name, now=10.0):
  """The items that a person gets, all of them sent."""
  person, got = app.user(database, name), []
  while (number := work.next_item(database, person, now)) is not None:
    got.append(number)
    app.submit(database, person, number)
  return got


def test_each_item_goes_to_as_many_people_as_are_wanted(database):
  assert work_off(database, "ann") == [3, 1, 2]  # the screening first
  assert work_off(database, "bea") == [3, 2]
  assert work_off(database, "rob") == [3]  # researchers get the screening only


def test_heldout_labelers_get_heldout_items_beside_those_who_train(tmp_path):
  database = app.make_project(tmp_path, [app.item("test", is_screening=True)], PEOPLE)
  numbers = projects.add(database, [app.item(f"{i}") for i in range(60)], 0.0)
  with database.read() as connection:
    rows = connection.execute(schema.items.select()).all()
  held_out = [row.id for row in rows if row.split == "validation"]
  assert 0 < len(held_out) < 20
  accounts.add(database, "zoe", "labeler", None, 0.0, cohort="heldout")
  assert work_off(database, "zoe") == sorted({1, *held_out})
  assert work_off(database, "ann") == [1, *numbers]  # nothing of it was taken from training
  assert work_off(database, "bea") == [1]


def test_an_open_item_is_kept_for_its_labeler_and_given_away_after_a_day(database):
  ann, bea = app.user(database, "ann"), app.user(database, "bea")
  app.submit(database, ann, work.next_item(database, ann, 0.0))
  assert work.next_item(database, ann, 0.0) == 1 == work.next_item(database, ann, 5.0)
  assert work_off(database, "bea") == [3, 2]
  assert work.next_item(database, bea, DAY - 1) is None
  assert work.next_item(database, bea, DAY + 1) == 1


def test_a_skipped_item_goes_to_another(database):
  ann, bea = app.user(database, "ann"), app.user(database, "bea")
  app.submit(database, ann, work.next_item(database, ann, 0.0))
  work.next_item(database, ann, 0.0)
  work.skip(database, ann, work.task(database, ann, 1), "no reason", 1.0)
  assert work.next_item(database, ann, 1.0) == 2
  assert work_off(database, "bea") == [3, 1, 2]
  assert work.progress(database, ann, 1.0)[:3] == (1, 1, 1)
  assert work.progress(database, bea, 1.0)[:3] == (3, 0, 0)


def test_nobody_has_anothers_item(database):
  work.next_item(database, app.user(database, "ann"), 0.0)
  assert work.task(database, app.user(database, "bea"), 3) is None
  assert work.task(database, app.user(database, "ann"), 99) is None


def test_twenty_people_at_once_get_different_items(tmp_path):
  people = [(f"p{i}", "labeler") for i in range(20)]
  database = app.make_project(tmp_path, [app.item(f"{i}") for i in range(20)], people)
  got, users = [], [app.user(database, name) for name, _ in people]

  def one(person):
    got.append(work.next_item(database, person, 0.0))

  threads = [threading.Thread(target=one, args=(person,)) for person in users]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(got) == list(range(1, 21))


def test_a_form_is_taken_once(database):
  ann = app.user(database, "ann")
  work.next_item(database, ann, 0.0)
  found = work.task(database, ann, 3)
  send = lambda payload: work.submit(
    database, ann, found, found.assignment.token, payload, 5.0, 10.0
  )
  assert send({"answers": {}}) == "taken"
  assert send({"answers": {}}) == "again"  # the browser has sent it twice
  assert send({"answers": {"1": {}}}) == "stale"
  assert work.submit(database, ann, found, "guess", {}, 1.0, 10.0) == "stale"
  newest = work.task(database, ann, 3)
  assert work.submit(database, ann, newest, newest.assignment.token, {}, 1.0, 11.0) == "taken"
  with database.read() as connection:
    assert connection.execute(sa.select(schema.submissions.c.seconds)).scalars().all() == [5.0, 1.0]


def test_a_form_that_another_has_sent_is_not_taken(database):
  ann, bea = app.user(database, "ann"), app.user(database, "bea")
  work.next_item(database, ann, 0.0), work.next_item(database, bea, 0.0)
  theirs, own = work.task(database, ann, 3), work.task(database, bea, 3)
  assert work.submit(database, ann, theirs, theirs.assignment.token, {}, 1.0, 1.0) == "taken"
  assert work.submit(database, bea, own, theirs.assignment.token, {}, 1.0, 1.0) == "stale"


@pytest.mark.parametrize(
  ("seconds", "counted"), [(30.0, 30.0), (1e9, 100.0), (0.0, 100.0), (-5.0, 100.0)]
)
def test_no_more_time_counts_than_the_item_was_open(database, seconds, counted):
  ann = app.user(database, "ann")
  work.next_item(database, ann, 0.0)
  found = work.task(database, ann, 3)
  work.submit(database, ann, found, found.assignment.token, {}, seconds, 100.0)
  assert work.progress(database, ann, 100.0).seconds == counted


def test_a_revision_counts_from_when_the_sent_form_was_opened_again(database):
  """Not from the last draft, nor from an opening of long ago that led to nothing."""
  ann = app.user(database, "ann")
  work.next_item(database, ann, 0.0)
  app.submit(database, ann, 3, now=10.0)

  def look(now):
    found = work.task(database, ann, 3)
    work.reopen(database, found, now)
    return found, found.assignment.token

  def sent(seconds, now):
    found, token = look(now)
    work.submit(database, ann, found, token, {"answers": {}}, seconds, now)
    with database.read() as connection:
      query = sa.select(schema.submissions.c.seconds).order_by(schema.submissions.c.id.desc())
      return connection.execute(query.limit(1)).scalar_one()

  found, token = look(1000.0)
  assert work.save_draft(database, ann, found, token, {}, 1290.0)
  assert sent(280.0, 1300.0) == 280.0
  look(2000.0)
  assert sent(0.0, 2100.0) == 100.0  # without scripts
  look(3000.0)
  look(3000.0 + DAY)
  assert sent(0.0, 3060.0 + DAY) == 60.0
  found, token = look(2 * DAY)
  assert work.save_draft(database, ann, found, token, {}, 2 * DAY + 9)
  assert sent(5000.0, 3 * DAY) == 5000.0  # a draft is gone on with


def test_a_draft_comes_back_until_the_form_is_sent(database):
  ann = app.user(database, "ann")
  work.next_item(database, ann, 0.0)
  found = work.task(database, ann, 3)
  first = found.answers[0].id
  token, typed = found.assignment.token, {f"{first}.note": "half", "csrf": "x"}
  assert work.save_draft(database, ann, found, token, typed, 5.0)
  again = work.task(database, ann, 3)
  assert (again.values, again.saved) == ({f"{first}.note": "half"}, 5.0)
  app.submit(database, ann, 3)
  assert not work.save_draft(database, ann, found, token, {f"{first}.note": "late"}, 6.0)
  sent = work.task(database, ann, 3)
  assert sent.values[f"{first}.note"] == "" and sent.saved == 0


def test_labelers_see_answers_in_orders_of_their_own(tmp_path):
  people = [(f"p{i}", "labeler") for i in range(12)]
  database = app.make_project(tmp_path, [app.item(wanted=12)], people)
  orders = set()
  for name, _ in people:
    person = app.user(database, name)
    work.next_item(database, person, 0.0)
    orders.add(tuple(answer.id for answer in work.task(database, person, 1).answers))
    assert work.task(database, person, 1).answers == work.task(database, person, 1).answers
  assert len(orders) > 3
