"""The web application: routes, who may use them, and what holds for every request and answer.

Called by serving.py and the tests. Pages are functions of an `Asked` in the modules `*_pages`; each has a row in their
`ROUTES`, which says who may ask for it. Whatever has no row does not exist.
"""

import dataclasses
import functools
import hmac
import logging
import pathlib
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from instructjax.core.text import printable_lines
from instructjax.labels import accounts, projects, schema
from instructjax.labels.accounts import User
from instructjax.labels.schema import Database

HERE = pathlib.Path(__file__).parent
_LARGEST = 4 << 20  # bytes of a form
_MOST_FIELDS = 2000
EVERYBODY: tuple[str, ...] = ("labeler", "researcher", "admin", "user")
RESEARCHERS = ("researcher", "admin")
HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
  ),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "same-origin",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Site:
  """What all requests share.

  Attributes:
    database: the project's.
    is_secure: whether browsers reach it by https only, so that cookies may be marked for it.
    playground: a `playground.Playground`; None if there is none on this site.
    now: the clock.
  """

  database: Database
  is_secure: bool
  playground: Any = None
  now: Callable[[], float] = time.time

  @property
  def cookie(self) -> str:
    # A browser takes this prefix only from the host itself, over https.
    return "__Host-session" if self.is_secure else "session"


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request, after it was let in.

  Attributes:
    site: what all requests share.
    user: who asks; None on the pages for those who are not signed in.
    token: of the session, or of the browser before it has one.
    path, query, form: names and values.
    address: where from.
  """

  site: Site
  user: User | None
  token: str
  path: Mapping[str, Any]
  query: Mapping[str, str]
  form: Mapping[str, str]
  address: str

  @property
  def database(self) -> Database:
    return self.site.database

  @property
  def me(self) -> User:
    """Who asks, on a page for those who are signed in."""
    if self.user is None:
      raise ValueError("this page is for those who are signed in; its row in ROUTES says otherwise")
    return self.user

  @property
  def now(self) -> float:
    return self.site.now()


@dataclasses.dataclass(frozen=True)
class Page:
  """A row of a table of routes.

  Attributes:
    method: GET or POST.
    path: as Starlette spells it, `/items/{number:number}`.
    answer: makes the response.
    roles: who may ask; () for those who are not signed in.
  """

  method: str
  path: str
  answer: Callable[[Asked], Response]
  roles: tuple[str, ...]


class Refused(Exception):
  """A request that is not answered as asked.

  Args:
    status: of HTTP.
    message: shown on the page.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class _Number(IntegerConvertor):
  """The number of a row in a path. One with more digits than the database can hold is no page's."""

  regex = "[0-9]{1,9}"


register_url_convertor("number", _Number())

NOT_THERE = "There is no such page, or it is not yours."


@functools.cache
def _templates() -> jinja2.Environment:
  found = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  found.filters |= {
    "visible": printable_lines,
    "day": day,
    "minute": _minute,
    "percent": _percent,
    "duration": _duration,
  }
  return found


def day(at: float) -> str:
  """The day of a time, UTC."""
  return time.strftime("%Y-%m-%d", time.gmtime(at))


def _minute(at: float) -> str:
  return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))


def _percent(share: float | None) -> str:
  return "–" if share is None else f"{100 * share:.0f}%"


def _duration(seconds: float) -> str:
  return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def page(asked: Asked, name: str, status: int = 200, **values) -> HTMLResponse:
  """A page made of a template, which escapes texts and shows characters that would reorder others as codes."""
  project = projects.settings(asked.database)
  given = {
    "user": asked.user,
    "project": {name: printable_lines(value) for name, value in project.items()},
    "csrf": accounts.csrf(asked.token),
    "has_playground": asked.site.playground is not None,
  }
  html = _templates().get_template(name).render(given | values)
  return HTMLResponse(html, status)


def go(place: str) -> RedirectResponse:
  return RedirectResponse(place, 303)


def application(site: Site, tables: Iterable[Iterable[Page]], hosts: list[str]) -> Starlette:
  """The application.

  Args:
    site: what all requests share.
    tables: of routes.
    hosts: names by which browsers may reach it; others could be a foreign site's, pointed here.
  """
  routes = [
    Route(row.path, functools.partial(_answer, site, row), methods=[row.method])
    for table in tables
    for row in table
  ]
  static = StaticFiles(directory=HERE / "static")
  return Starlette(
    routes=[*routes, Mount("/static", static)],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_with_headers)],
    exception_handlers={
      404: functools.partial(_missing, site),
      405: functools.partial(_missing, site),
      **dict.fromkeys(schema.AWAY, _unavailable),
    },
  )


def _with_headers(app):
  """Every answer has the headers that tell the browser to run and to show nothing from elsewhere."""

  async def wrapped(scope, receive, send):
    async def sending(message):
      if message["type"] == "http.response.start":
        extra = dict(HEADERS)
        if not scope["path"].startswith("/static/"):
          extra["Cache-Control"] = "no-store"
        new = [(name.lower().encode(), value.encode()) for name, value in extra.items()]
        message["headers"] = [*message["headers"], *new]
      await send(message)

    await app(scope, receive, sending if scope["type"] == "http" else send)

  return wrapped


async def _missing(site: Site, request: Request, error: Exception) -> Response:
  try:
    return await run_in_threadpool(_refuse, site, request, Refused(404, NOT_THERE))
  except schema.AWAY as away:  # Starlette looks at no handler's own errors
    return await _unavailable(request, away)


async def _unavailable(request: Request, error: Exception) -> Response:
  """The database is gone or refuses, as PostgreSQL does while it is started again, or SQLite on a full disk.

  No other page can be shown without it. Its connections are tried again with the next request.
  """
  # SQLite calls a wrong statement so too: a bug, which is to be seen with its traceback.
  if getattr(getattr(error, "orig", None), "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
    raise error
  path = printable_lines(request.url.path)
  logging.getLogger(__name__).warning("%s %s: %s", request.method, path, schema.why(error))
  html = _templates().get_template("unavailable.html").render()
  return HTMLResponse(html, 503, {"Retry-After": "5"})


async def _answer(site: Site, row: Page, request: Request) -> Response:
  form = {}
  if row.method == "POST":
    try:
      form = await _form(request)
    except Refused as error:
      return await run_in_threadpool(_refuse, site, request, error)
  return await run_in_threadpool(_let_in, site, row, request, form)


async def _form(request: Request) -> dict[str, str]:
  """The fields of a form, of which each name counts once."""
  body = b""
  async for part in request.stream():
    body += part
    if len(body) > _LARGEST:
      raise Refused(413, f"A form may have at most {_LARGEST >> 20} MB.")
  kind = request.headers.get("content-type", "").partition(";")[0].strip()
  if kind != "application/x-www-form-urlencoded":
    raise Refused(415, "A form must be sent as application/x-www-form-urlencoded.")
  try:
    pairs = urllib.parse.parse_qsl(
      body.decode("ascii"),
      keep_blank_values=True,
      strict_parsing=bool(body),
      encoding="utf-8",
      errors="strict",
      max_num_fields=_MOST_FIELDS,
    )
  except ValueError as error:
    raise Refused(400, "This form cannot be read.") from error
  return dict(pairs)


def _visitor(site: Site, request: Request) -> Asked:
  token = request.cookies.get(site.cookie, "")
  return Asked(
    site=site,
    user=accounts.who(site.database, token, site.now()) if token else None,
    token=token or request.cookies.get("before", ""),
    path=request.path_params,
    query=request.query_params,
    form={},
    address=request.client.host if request.client else "",
  )


def _let_in(site: Site, row: Page, request: Request, form: dict[str, str]) -> Response:
  """Answers a request of one who may ask."""
  asked = _visitor(site, request)
  try:
    if row.roles and asked.user is None:
      if row.method == "GET":
        return go("/sign-in")
      raise Refused(401, "You are not signed in any more. Sign in, and open the page again.")
    if row.roles and asked.me.role not in row.roles:
      raise Refused(404, NOT_THERE)
    if row.method == "POST":
      _require_own_form(asked, request, form)
      asked = dataclasses.replace(asked, form=form)
    return row.answer(asked)
  except Refused as error:
    return _refusal(asked, error)


def _require_own_form(asked: Asked, request: Request, form: dict[str, str]):
  """The form came from a page of ours, not from another site that uses the browser's cookie."""
  origin = request.headers.get("origin")
  is_own = origin is None or origin.partition("://")[2] == request.headers.get("host")
  expected = accounts.csrf(asked.token)
  if (
    not asked.token
    or not is_own
    or not hmac.compare_digest(form.get("csrf", "").encode(), expected.encode())
  ):
    raise Refused(403, "This form is too old, or came from another site. Open the page again.")


def _refuse(site: Site, request: Request, error: Refused) -> Response:
  """Refuses a request of one who was not let in yet."""
  return _refusal(_visitor(site, request), error)


def _refusal(asked: Asked, error: Refused) -> Response:
  return page(asked, "refused.html", error.status, message=str(error))


def json(value: Any, status: int = 200) -> JSONResponse:
  return JSONResponse(value, status)
