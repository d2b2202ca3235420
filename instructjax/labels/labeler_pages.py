"""The labeler's pages: what to do next, one item's form, drafts, skipping, and what was done.

No page here is given the origin of an answer.
"""

import json

from starlette.responses import Response

from instructjax.labels import forms, web, work
from instructjax.labels.web import NOT_THERE, Asked, Page, Refused, go, page

_WORKERS = ("labeler", "researcher")
_LETTERS = "ABCDEFGHI"


def home(asked: Asked) -> Response:
  return page(asked, "work.html", progress=work.progress(asked.database, asked.me, asked.now))


def next_item(asked: Asked) -> Response:
  number = work.next_item(asked.database, asked.me, asked.now)
  return go("/work" if number is None else f"/items/{number}")


def _own(asked: Asked) -> work.Task:
  found = work.task(asked.database, asked.me, asked.path["number"])
  if found is None:
    raise Refused(404, NOT_THERE)
  return found


def item(asked: Asked) -> Response:
  found = _own(asked)
  return _item_page(asked, found, found.values, {})


def shown_prompt(text: str) -> list[tuple[str, str]]:
  """(who speaks, what) of a prompt as the database holds it; nobody is named where it is no chat."""
  prompt = json.loads(text)
  if isinstance(prompt, str):
    return [("", prompt)]
  return [(message["role"], message["content"]) for message in prompt]


def _item_page(
  asked: Asked,
  found: work.Task,
  values: dict[str, str],
  problems: dict[str, str],
  status: int = 200,
) -> Response:
  form = forms.FORMS[found.item.kind]
  work.reopen(asked.database, found, asked.now)
  return page(
    asked,
    "item.html",
    status,
    form=form,
    item_id=found.item.id,
    kind=found.item.kind,
    prompt=shown_prompt(found.item.prompt),
    answers=[(letter, answer.id, answer.text) for letter, answer in zip(_LETTERS, found.answers)],
    token=found.assignment.token,
    state=found.assignment.state,
    saved=found.saved,
    values=values,
    problems=problems,
    reasons=work.REASONS,
    progress=work.progress(asked.database, asked.me, asked.now),
  )


def save_draft(asked: Asked) -> Response:
  found = _own(asked)
  token = asked.form.get("token", "")
  if not work.save_draft(asked.database, asked.me, found, token, asked.form, asked.now):
    return web.json({"problem": "This form was sent already."}, 409)
  return web.json({"saved": asked.now})


def submit(asked: Asked) -> Response:
  found = _own(asked)
  kind, numbers = found.item.kind, [answer.id for answer in found.answers]
  payload, problems = forms.parse(kind, numbers, asked.form)
  token = asked.form.get("token", "")
  if problems:
    work.save_draft(asked.database, asked.me, found, token, asked.form, asked.now)
    return _item_page(asked, found, forms.kept(kind, numbers, asked.form), problems, 400)
  seconds = forms.seconds_of(asked.form)
  outcome = work.submit(asked.database, asked.me, found, token, payload, seconds, asked.now)
  if outcome == "stale":
    raise Refused(409, "You have sent this form before. Open the item again to change it.")
  return go("/next")


def skip(asked: Asked) -> Response:
  found = _own(asked)
  reason = asked.form.get("reason", "")
  if reason not in work.REASONS:
    raise Refused(400, "Choose why you skip this item.")
  said = asked.form.get("said", "").strip()[:500]
  work.skip(asked.database, asked.me, found, f"{reason}: {said}" if said else reason, asked.now)
  return go("/next")


def history(asked: Asked) -> Response:
  rows = [
    (row, shown_prompt(row.prompt)[-1][1][:200]) for row in work.history(asked.database, asked.me)
  ]
  return page(asked, "history.html", rows=rows, forms=forms.FORMS)


ROUTES = (
  Page("GET", "/work", home, _WORKERS),
  Page("GET", "/next", next_item, _WORKERS),
  Page("GET", "/items/{number:number}", item, _WORKERS),
  Page("POST", "/items/{number:number}/draft", save_draft, _WORKERS),
  Page("POST", "/items/{number:number}/submit", submit, _WORKERS),
  Page("POST", "/items/{number:number}/skip", skip, _WORKERS),
  Page("GET", "/history", history, _WORKERS),
)
