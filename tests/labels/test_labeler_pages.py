"""A labeler's work in a browser without scripts: plain forms."""

import json

import pytest

from instructjax.data.records import Chat
from instructjax.labels import work
from tests.labels import app

CHAT = Chat((("system", "Be brief."), ("user", "Hi.")))


@pytest.fixture
def database(tmp_path):
  items = [app.item(), app.item(CHAT, (), "demonstration"), app.item("t", kind="toxicity")]
  return app.make_project(tmp_path, items)


@pytest.fixture
def ann(database):
  return app.browser(database, "ann")


def test_from_the_first_item_to_the_last(database, ann):
  assert "0 of 3 items done" in ann.get("/work").text
  page = ann.get("/next").text
  for text in (
    "Name a colour.",
    "Blue.",
    "Green, or so.",
    "Denigrates a protected class",
    "Rank of",
  ):
    assert text in page
  ids = app.answers_of(database, 1).values()
  second = ann.post("/items/1/submit", "/items/1", **app.filled("ranking", ids, [1, 1, 2]))
  assert second.url.path == "/items/2" and "Be brief." in second.text
  third = ann.post("/items/2/submit", "/items/2", text="Hello.\r\n")
  assert third.url.path == "/items/3" and "Continues the prompt" in third.text
  ids = app.answers_of(database, 3).values()
  end = ann.post("/items/3/submit", "/items/3", **app.filled("toxicity", ids, [1, 2, 3]))
  assert end.url.path == "/work" and "nothing left to do" in end.text
  history = ann.get("/history").text
  assert history.count('class="tag done"') == 3


def test_what_is_missing_is_named_and_what_was_filled_in_stays(database, ann):
  ann.get("/next")
  ids = list(app.answers_of(database, 1).values())
  half = app.filled("ranking", ids, [1, 2, 3]) | {f"{ids[0]}.rank": "", f"{ids[1]}.sexual": "x"}
  page = ann.post("/items/1/submit", "/items/1", **half | {f"{ids[2]}.note": "kept <b>"})
  assert page.status_code == 400 and "2 questions are" in page.text
  assert "Choose 1 to 3." in page.text and "Choose yes or no." in page.text
  for text in (page.text, ann.get("/items/1").text):  # it is the draft too
    assert "kept &lt;b&gt;" in text and text.count(" selected") == 2


def test_a_form_sent_twice_is_one_submission(database, ann):
  ann.get("/next")
  ids = app.answers_of(database, 1).values()
  fields = ann.hidden(ann.get("/items/1").text) | app.filled("ranking", ids, [1, 2, 3])
  send = lambda **more: ann.client.post("/items/1/submit", data=fields | more)
  assert send().url.path == send().url.path == "/items/2"
  changed = send(**{f"{min(ids)}.note": "changed"})
  assert changed.status_code == 409 and "sent this form before" in changed.text
  page = ann.get("/items/1").text
  assert "You have sent this" in page and page.count(" selected") == 3


def test_drafts(database, ann):
  ann.get("/next")
  first = min(app.answers_of(database, 1).values())
  saved = ann.post("/items/1/draft", "/items/1", **{f"{first}.note": "half a note"})
  assert saved.status_code == 200 and saved.json()["saved"] > 0
  assert "half a note" in ann.get("/items/1").text
  late = ann.post("/items/1/draft", "/items/1", token="an old one")
  assert late.status_code == 409


def test_skipping_needs_a_reason(database, ann):
  ann.get("/next")
  refused = ann.post("/items/1/skip", "/items/1", reason="because")
  assert refused.status_code == 400 and "Choose why" in refused.text
  after = ann.post("/items/1/skip", "/items/1", reason="Another reason", said="Too long.")
  assert after.url.path == "/items/2"
  history = ann.get("/history").text
  assert "Another reason: Too long." in history and 'class="tag skipped"' in history


def test_seconds_are_carried_from_page_to_page(database, ann):
  """From a draft and from a form with something missing, until it is sent; what is sent later begins at none."""
  ann.get("/next")
  seconds = lambda page: ann.hidden(page)["seconds"]
  assert seconds(ann.get("/items/1").text) == "0"
  ann.post("/items/1/draft", "/items/1", seconds="70")
  page = ann.get("/items/1").text
  assert seconds(page) == "70" and 'data-seconds="70"' in page
  page = ann.post("/items/1/submit", "/items/1", seconds="95").text
  assert "are\nnot answered yet" in page and seconds(page) == "95"
  assert seconds(ann.get("/items/1").text) == "95"
  ids = app.answers_of(database, 1).values()
  ann.post("/items/1/submit", "/items/1", **app.filled("ranking", ids, [1, 2, 3]))
  assert seconds(ann.get("/items/1").text) == "0"


def test_opening_what_was_sent_begins_its_revision(database, ann):
  ann.get("/next")
  ids = app.answers_of(database, 1).values()
  ann.post("/items/1/submit", "/items/1", **app.filled("ranking", ids, [1, 2, 3]))
  reopened = lambda: work.task(database, app.user(database, "ann"), 1).assignment.reopened
  assert reopened() == 0
  ann.get("/items/1")
  first = reopened()
  assert first > 0
  ann.get("/items/1")
  assert reopened() == first


def test_seconds_that_are_no_number_do_no_harm(database, ann):
  ann.get("/next")
  ids = app.answers_of(database, 1).values()
  sent = app.filled("ranking", ids, [1, 2, 3])
  assert ann.post("/items/1/submit", "/items/1", **sent, seconds="nan").url.path == "/items/2"
  assert ann.post("/items/2/submit", "/items/2", text="x", seconds="a").url.path == "/items/3"
  assert "nan" not in json.dumps(ann.get("/work").text)
