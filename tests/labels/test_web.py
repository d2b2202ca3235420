"""What holds for all pages: who may ask for what, foreign forms, headers, and hostile texts."""

import re

import pytest
import sqlalchemy as sa

from instructjax.labels import accounts, playground, projects, schema, serving, web, work
from tests.labels import app

PEOPLE = (("ann", "labeler"), ("rob", "researcher"), ("ada", "admin"), ("una", "user"))
PLAY = playground.Playground(playground.Model(str.upper), str.strip)
ROWS = [row for table in serving.TABLES for row in table]
HOSTILE = (
  '<script>alert(1)</script><img src=x onerror="alert(2)">"\'</div> \u202egnp.exe\u202c \x1b[31m',
  "]]>--><svg/onload=alert(3)>{{ 7*7 }}{% raise %}",
)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
  items = [
    app.item(wanted=2),
    app.item("write", (), "demonstration"),
    app.item("t", kind="toxicity"),
  ]
  found = app.make_project(tmp_path_factory.mktemp("project"), items, PEOPLE)
  for item in (1, 2, 3):
    assert work.next_item(found, app.user(found, "ann"), 0.0) == item
    app.submit(found, app.user(found, "ann"), item)
  return found


@pytest.fixture(scope="module")
def browsers(database):
  """Role -> a browser in which somebody of the role is signed in; "" for nobody."""
  people = [("", ""), *PEOPLE]
  return {role: app.browser(database, name, PLAY) for name, role in people}


def url(row):
  return re.sub(r"\{(\w+)(:number)?\}", "1", row.path)


@pytest.mark.parametrize("role", ["", *accounts.ROLES])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.path}")
def test_every_route_with_every_role(browsers, row, role):
  """Who may not ask is told that there is no such page, or sent to sign in, and sees nothing of it."""
  client = browsers[role].client
  if row.method == "GET":
    answer = client.get(url(row), follow_redirects=False)
  else:
    answer = client.post(url(row), data={"csrf": "guess"}, follow_redirects=False)
  if not row.roles:
    assert answer.status_code in (200, 303, 403)
  elif not role:
    to_sign_in = answer.status_code == 303 and answer.headers["location"] == "/sign-in"
    assert to_sign_in if row.method == "GET" else answer.status_code == 401
  elif role not in row.roles:
    assert answer.status_code == 404 and web.NOT_THERE in answer.text
  elif row.method == "POST":
    assert answer.status_code == 403 and "came from another site" in answer.text
  elif "{" not in row.path or role == "labeler":  # the item is the labeler's own
    assert answer.status_code in (200, 303)
  else:
    assert answer.status_code in (200, 404)
  assert "default-src 'none'" in answer.headers["content-security-policy"]
  assert "<script>" not in answer.text and " onclick=" not in answer.text
  if role in ("labeler", "user"):
    assert "model-one" not in answer.text and "model-two" not in answer.text


def test_an_item_is_nobody_elses(browsers):
  assert browsers["labeler"].get("/items/1").status_code == 200
  for role in ("researcher", "admin"):
    assert browsers[role].get("/items/1").status_code == 404
  for path in ("/items/99", "/items/x", "/.git/config", "/static/../web.py"):
    assert browsers["labeler"].get(path).status_code == 404
  for digits in (10, 20, 5000):  # more than the database holds, and than Python reads
    assert browsers["labeler"].get(f"/items/{'9' * digits}").status_code == 404


def test_a_form_from_another_site_is_refused(browsers):
  ann = browsers["labeler"]
  csrf = ann.hidden(ann.get("/account").text)["csrf"]
  send = lambda **headers: ann.client.post(
    "/account", data={"csrf": csrf, "old": "x", "new": "y", "again": "z"}, headers=headers
  )
  assert send().status_code == 400  # taken, and the passwords are wrong
  assert send(origin="http://testserver").status_code == 400
  assert send(origin="http://evil.example").status_code == 403
  assert send(origin="null").status_code == 403
  assert ann.client.post("/account", json={"csrf": csrf}).status_code == 415
  assert ann.client.post("/account", data={"csrf": "ä" * 64}).status_code == 403
  other = browsers["researcher"]
  theirs = other.hidden(other.get("/account").text)["csrf"]
  assert ann.client.post("/account", data={"csrf": theirs}).status_code == 403


def test_a_form_that_is_too_large_or_broken_is_refused(browsers):
  client = browsers["labeler"].client
  kind = {"content-type": "application/x-www-form-urlencoded"}
  assert client.post("/account", content=b"a" * (5 << 20), headers=kind).status_code == 413
  assert client.post("/account", content=b"a=%ff%fe", headers=kind).status_code == 400
  assert client.post("/account", content=b"\xff", headers=kind).status_code == 400
  assert client.post("/account", content=b"a=1&" * 3000 + b"b=2", headers=kind).status_code == 400


def test_another_host_is_refused(browsers):
  answer = browsers[""].client.get("/sign-in", headers={"host": "evil.example"})
  assert answer.status_code == 400


@pytest.mark.parametrize(("is_secure", "name"), [(False, "session"), (True, "__Host-session")])
def test_cookies_are_out_of_reach_of_scripts_and_other_sites(database, is_secure, name):
  from starlette.testclient import TestClient

  made = serving.make(database, ["testserver"], is_secure)
  browser = app.Browser(TestClient(made, base_url="https://testserver"))
  cookies = browser.sign_in("ann").history[0].headers.get_list("set-cookie")
  (cookie,) = [one for one in cookies if one.startswith(f"{name}=")]
  for flag in ("HttpOnly", "SameSite=lax", "Path=/"):
    assert flag in cookie
  assert ("Secure" in cookie) == is_secure
  out = browser.post("/sign-out", "/account").history[0]
  assert out.headers["clear-site-data"] == '"storage"'
  assert browser.get("/work").url.path == "/sign-in"


@pytest.mark.parametrize("text", [*HOSTILE, "\u05d0\u200f\u2067x", "x" * (1 << 20)])
def test_hostile_texts_are_shown_as_text(tmp_path, text):
  items = [app.item(text, ((text, "m"), ("b", "m")))]
  database = app.make_project(tmp_path, items)
  projects.change(database, {"title": text[:200], "warning": text[:200]})
  ann = app.browser(database, "ann")
  page = ann.get("/next").text
  tags = lambda html: re.findall(r"<[a-z!/][^>]*", html)
  names = {re.match(r"</?([a-z!]+)", tag)[1] for tag in tags(page)}
  assert not names & {"svg", "img", "iframe"} and page.count("<script") == 1
  assert "\u202e" not in page and "\x1b" not in page and "49{" not in page
  if text == HOSTILE[0]:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "\\u202egnp.exe" in page
  if len(text) == 1 << 20:
    assert page.count(text) == 2  # whole, as prompt and as answer
  assert page.count('class="text" dir="auto"') == 3


@pytest.mark.parametrize("kind", ["OperationalError", "InterfaceError"])
@pytest.mark.parametrize("way", ["read", "write"])
def test_a_database_that_is_away_is_said_in_a_page_and_a_line(
  tmp_path, monkeypatch, caplog, way, kind
):
  """As PostgreSQL is while it is started again. What was sent can be sent afterwards."""
  database = app.make_project(tmp_path, [app.item()])
  ann = app.browser(database, "ann")
  fields = ann.hidden(ann.get("/next").text)
  ids = app.answers_of(database, 1).values()
  fields |= app.filled("ranking", ids, (1, 2, 3))

  def away(self):
    raise getattr(sa.exc, kind)("SELECT secret", {}, Exception("connection refused\nDETAIL: x"))

  with monkeypatch.context() as patch:
    patch.setattr(schema.Database, way, away)
    assert ann.get("/no/such/page").status_code == (503 if way == "read" else 404)
    caplog.clear()
    answer = ann.client.post("/items/1/submit", data=fields)
  assert answer.status_code == 503 and "database does not answer just now" in answer.text
  assert answer.headers["retry-after"] == "5" and "secret" not in answer.text + caplog.text
  (record,) = [row for row in caplog.records if row.levelname == "WARNING"]
  assert record.getMessage() == "POST /items/1/submit: connection refused"
  ann.client.post("/items/1/submit", data=fields)
  with database.read() as connection:
    assert len(connection.execute(schema.submissions.select()).all()) == 1


def test_a_wrong_statement_is_a_bug_and_not_a_database_that_is_away(tmp_path):
  database = app.make_project(tmp_path)
  ann = app.browser(database, "ann")
  with database.write() as connection:
    connection.exec_driver_sql("DROP TABLE survey")
  with pytest.raises(sa.exc.DBAPIError, match="survey"):
    ann.get("/survey")


def test_a_session_that_has_ended_does_not_lose_the_form_silently(tmp_path):
  database = app.make_project(tmp_path, [app.item()])
  ann = app.browser(database, "ann")
  fields = ann.hidden(ann.get("/next").text)
  with database.write() as connection:
    connection.execute(schema.sessions.delete())
  answer = ann.client.post("/items/1/submit", data=fields)
  assert answer.status_code == 401 and "not signed in any more" in answer.text
