"""A labeling project in a folder of its own and browsers without scripts, for the tests of the application."""

import dataclasses
import re

import argon2
import httpx
from starlette.testclient import TestClient

from instructjax.labels import accounts, forms, projects, schema, serving, work

PRODUCTION = accounts._hasher
# A hash takes long, on purpose, and tests sign in often.
accounts._hasher = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
accounts._NOBODY = accounts._hasher.hash("nobody's")
PASSWORD = "correct horse"
HASH = accounts.hash_password(PASSWORD)
ANSWERS = (("Blue.", "model-one"), ("Green, or so.", "model-two"), ("No.", "model-one"))


def item(prompt="Name a colour.\n", answers=ANSWERS, kind="ranking", **more) -> projects.Item:
  return projects.Item(kind, prompt, answers, **more)


def make_project(place, items=(), people=(("ann", "labeler"),)) -> schema.Database:
  """A project with people, all of the same password, and items."""
  database = schema.create(str(place))
  for name, role in people:
    number = accounts.add(database, name, role, None, 1000.0)
    with database.write() as connection:
      connection.execute(
        schema.users.update().where(schema.users.c.id == number).values(password=HASH)
      )
  projects.add(database, items, 1000.0)
  return database


def user(database, name: str) -> accounts.User:
  (found,) = [row for row in accounts.everybody(database) if row.name == name]
  return accounts.User(found.id, found.name, found.role)


@dataclasses.dataclass(frozen=True)
class Browser:
  """A browser without scripts, which keeps cookies and fills in the hidden fields of the form that it looks at."""

  client: TestClient

  def get(self, path: str) -> httpx.Response:
    return self.client.get(path)

  def hidden(self, html: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', html))

  def post(self, path: str, page: str, **fields) -> httpx.Response:
    """Sends a form that stands on a page."""
    return self.client.post(path, data=self.hidden(self.get(page).text) | fields)

  def sign_in(self, name: str, password: str = PASSWORD) -> httpx.Response:
    return self.post("/sign-in", "/sign-in", name=name, password=password)


def browser(database: schema.Database, name: str = "", play=None) -> Browser:
  """A browser, in which `name` is signed in."""
  app = serving.make(database, ["testserver"], play=play)
  found = Browser(TestClient(app, raise_server_exceptions=True))
  if name:
    assert found.sign_in(name).status_code == 200
  return found


def answers_of(database, item_id: int) -> dict[str, int]:
  """Text -> number of an item's answers."""
  with database.read() as connection:
    _, rows = projects.get(connection, item_id)
  return {row.text: row.id for row in rows}


def filled(kind: str, ids, ranks, **more) -> dict[str, str]:
  """The fields of a form that is whole, with these ranks."""
  form, values = forms.FORMS[kind], {}
  for number, rank in zip(ids, ranks, strict=True):
    values |= {f"{number}.{scale.name}": str(scale.high) for scale in form.scales}
    values |= {f"{number}.{name}": "no" for name, _ in form.fields}
    values[f"{number}.rank"] = str(rank)
  return values | more


def submit(database, person: accounts.User, item_id: int, ranks=None, now: float = 2000.0, **more):
  """Sends a whole form of an item that the person was given."""
  found = work.task(database, person, item_id)
  ids = [answer.id for answer in found.answers]
  places = ranks or range(1, len(ids) + 1)
  if found.item.kind == "demonstration":
    values = {"text": "An answer."}
  else:
    values = filled(found.item.kind, ids, places)
  payload, problems = forms.parse(found.item.kind, ids, values | more)
  assert not problems
  return work.submit(database, person, found, found.assignment.token, payload, 1.0, now)
