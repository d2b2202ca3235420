"""Pages of accounts: signing in and out, one's own password, and the admin's list of people."""

import dataclasses
import secrets

from starlette.responses import Response

from instructjax.core.errors import UserError
from instructjax.data import label_records
from instructjax.labels import accounts
from instructjax.labels.web import EVERYBODY, Asked, Page, go, page


def front(asked: Asked) -> Response:
  role = asked.me.role
  if role == "user":  # who has nothing else here
    return go("/playground" if asked.site.playground else "/account")
  return go("/work" if role == "labeler" else "/overview")


def sign_in_form(asked: Asked) -> Response:
  if asked.user:
    return go("/")
  return _sign_in_page(asked, "")


def _sign_in_page(asked: Asked, message: str, status: int = 200) -> Response:
  # A form before there is a session is bound to the browser by a cookie of its own.
  token = asked.token or secrets.token_urlsafe(16)
  response = page(dataclasses.replace(asked, token=token), "sign_in.html", status, message=message)
  if token != asked.token:
    _set_cookie(asked, response, "before", token)
  return response


def sign_in(asked: Asked) -> Response:
  name, password = asked.form.get("name", "").strip(), asked.form.get("password", "")
  try:
    token = accounts.sign_in(asked.database, name, password, asked.address, asked.now)
  except accounts.TooMany:
    return _sign_in_page(asked, "Too many wrong passwords. Try again in 15 minutes.", 429)
  if token is None:
    return _sign_in_page(asked, "Name and password do not belong together.", 403)
  response = go("/")
  _set_cookie(asked, response, asked.site.cookie, token)
  response.delete_cookie("before")
  return response


def _set_cookie(asked: Asked, response: Response, name: str, value: str):
  response.set_cookie(
    name, value, path="/", httponly=True, samesite="lax", secure=asked.site.is_secure
  )


def sign_out(asked: Asked) -> Response:
  accounts.sign_out(asked.database, asked.token, asked.me, asked.now)
  response = go("/sign-in")
  response.delete_cookie(
    asked.site.cookie, httponly=True, samesite="lax", secure=asked.site.is_secure
  )
  # Drafts that this browser has kept are of nobody's concern who uses it next.
  response.headers["Clear-Site-Data"] = '"storage"'
  return response


def account(asked: Asked) -> Response:
  return page(asked, "account.html", message="", problem="")


def change_password(asked: Asked) -> Response:
  old, new, again = (asked.form.get(name, "") for name in ("old", "new", "again"))
  try:
    if new != again:
      raise UserError("the new password was typed in two ways")
    accounts.change_password(asked.database, asked.me, old, new, asked.token, asked.now)
  except UserError as error:
    return page(asked, "account.html", 400, message="", problem=str(error))
  return page(asked, "account.html", message="Your password is changed.", problem="")


def people(asked: Asked) -> Response:
  return _people_page(asked)


def _people_page(asked: Asked, message: str = "", problem: str = "", status: int = 200) -> Response:
  return page(
    asked,
    "people.html",
    status,
    people=accounts.everybody(asked.database),
    roles=accounts.ROLES,
    cohorts=label_records.COHORTS,
    message=message,
    problem=problem,
  )


def change_people(asked: Asked) -> Response:
  """Adds a person, gives one a new password, or lets one in or not."""
  form, name = asked.form, asked.form.get("name", "").strip()
  try:
    if form.get("do") == "add":
      password = accounts.new_password()
      role, cohort = form.get("role", ""), form.get("cohort", "training")
      accounts.add(asked.database, name, role, password, asked.now, cohort)
      message = f"{name} can sign in with the password {password}, which is shown this once."
    elif form.get("do") == "reset":
      password = accounts.reset_password(asked.database, name, asked.now)
      message = f"The new password of {name} is {password}, which is shown this once."
    elif form.get("do") in ("shut out", "let in"):
      if name == asked.me.name:
        raise UserError("you cannot shut yourself out")
      accounts.set_active(asked.database, name, form["do"] == "let in", asked.now)
      message = f"{name} is {'let in' if form['do'] == 'let in' else 'shut out'}."
    else:
      raise UserError("nothing was asked for")
  except UserError as error:
    return _people_page(asked, problem=str(error), status=400)
  return _people_page(asked, message=message)


ROUTES = (
  Page("GET", "/", front, EVERYBODY),
  Page("GET", "/sign-in", sign_in_form, ()),
  Page("POST", "/sign-in", sign_in, ()),
  Page("POST", "/sign-out", sign_out, EVERYBODY),
  Page("GET", "/account", account, EVERYBODY),
  Page("POST", "/account", change_password, EVERYBODY),
  Page("GET", "/people", people, ("admin",)),
  Page("POST", "/people", change_people, ("admin",)),
)
