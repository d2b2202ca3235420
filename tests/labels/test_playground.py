"""The playground: nothing is kept without consent, and what is kept is shown and can be taken back."""

import threading

import pytest
import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.labels import playground, prompts, schema
from instructjax.labels.playground import Limits, Model, Playground
from tests.labels import app

PEOPLE = (("una", "user"), ("ann", "labeler"), ("rob", "researcher"))
HOSTILE = "<script>alert(1)</script></textarea>\u202eevil {{ 7*7 }} " + "x" * 100


@pytest.fixture
def database(tmp_path):
  return app.make_project(tmp_path, [], PEOPLE)


def una(database, answer=lambda prompt: f"You said: {prompt}", **more):
  play = Playground(Model(answer), lambda text: text.replace("jo@x.org", "[EMAIL]"), **more)
  return app.browser(database, "una", play)


def ask(browser, prompt, **fields):
  return browser.post("/playground", "/playground", prompt=prompt, **fields)


def kept(database) -> list[str]:
  with database.read() as connection:
    return list(connection.execute(sa.select(schema.prompts.c.text)).scalars())


def everything(database) -> str:
  with database.read() as connection:
    tables = [table for table in schema.metadata.sorted_tables if table.name != "settings"]
    return str([connection.execute(table.select()).all() for table in tables])


def test_nothing_is_kept_without_consent(database):
  browser = una(database)
  found = ask(browser, "my secret prompt")
  assert "You said: my secret prompt" in found.text and "Nothing was kept." in found.text
  assert "secret" not in everything(database) and " checked" not in found.text
  assert ask(browser, "my secret prompt", consent="no").status_code == 200
  assert "secret" not in everything(database)


def test_what_is_kept_is_shown_and_can_be_taken_back(database):
  browser = una(database)
  found = ask(browser, "Write to jo@x.org", consent="yes").text
  assert kept(database) == ["Write to [EMAIL]"]
  assert "This was kept of your prompt:" in found and "Write to [EMAIL]" in found
  assert "You said: Write to jo@x.org" in found  # what the model reads is the user's own
  assert "jo@x.org" not in everything(database)
  assert (
    "one that begins like it is there already"
    in ask(browser, "write  to jo@x.org", consent="yes").text
  )
  assert browser.post("/playground/forget", "/playground", number="99").status_code == 404
  assert browser.post("/playground/forget", "/playground").status_code == 200  # its own button
  assert kept(database) == []


def test_hostile_texts_are_texts(database):
  found = ask(una(database), HOSTILE, consent="yes").text
  assert (
    "<script>" not in found and "\u202e" not in found.replace(HOSTILE, "").split("<textarea", 1)[0]
  )
  assert "&lt;/textarea&gt;" in found and "{{ 7*7 }}" in found
  answer = found.split("<h2>Answer</h2>")[1]
  assert "\u202e" not in answer and "\\u202e" in answer


def test_too_much_is_refused(database):
  browser = una(database)
  assert ask(browser, "x" * (playground.LONGEST + 1)).status_code == 400
  assert ask(browser, " \n").status_code == 400 and ask(browser, "a\0b").status_code == 400
  said = [ask(browser, f"p{i}").status_code for i in range(playground._A_MINUTE + 1)]
  assert said == [200] * playground._A_MINUTE + [429]


def test_limits_pass_with_time():
  limits = Limits()
  assert all(limits.may_send(1, 0.0) for _ in range(10)) and not limits.may_send(1, 59.0)
  assert limits.may_send(2, 0.0) and limits.may_send(1, 60.5)
  at = 100.0
  while limits.may_send(1, at):
    at += 7.0
  assert 400 < (at - 100.0) / 7.0 < 500 and limits.may_send(1, at + 86_400.0)


def test_a_model_that_fails_or_is_busy(database):
  def refuse(prompt):
    raise UserError("no room")

  found = ask(una(database, refuse), "p", consent="yes")
  assert found.status_code == 400 and "The model cannot answer this prompt." in found.text
  assert kept(database) == []
  go, begun = threading.Event(), threading.Event()

  def slow(prompt):
    begun.set()
    assert go.wait(20)
    return "late"

  model = Model(slow)
  model._seats = threading.BoundedSemaphore(1)
  said = []
  first = threading.Thread(target=lambda: said.append(model.answer("a")))
  first.start()
  assert begun.wait(20) and model.answer("b") is None
  go.set()
  first.join(20)
  assert said == ["late"] and model.answer("c") == "late"


def test_who_has_the_page(database):
  browser = una(database)
  assert browser.get("/").url.path == "/playground"
  for path in ("/work", "/overview", "/next", "/history", "/people", "/trainings"):
    assert browser.get(path).status_code == 404
  play = Playground(Model(str.upper), str)
  assert app.browser(database, "ann", play).get("/playground").status_code == 404
  assert "/playground" in app.browser(database, "rob", play).get("/overview").text
  without = app.browser(database, "una")
  assert without.get("/playground").status_code == 404 and without.get("/").url.path == "/account"
  assert "Playground" not in without.get("/account").text


def test_a_form_from_elsewhere_is_refused(database):
  browser = una(database)
  answer = browser.client.post(
    "/playground", data={"prompt": "p", "consent": "yes", "csrf": "guess"}
  )
  assert answer.status_code == 403 and kept(database) == []
  assert prompts.of_user(database, app.user(database, "una")) == []
