"""The researcher's pages: overview, agreement, screening, disagreements, and one item with all that was said of it.

Only here are the models named that gave the answers.
"""

import collections
import json
from collections.abc import Sequence

import sqlalchemy as sa
from starlette.responses import Response

from instructjax.labels import agreement, judgements, projects, rounds, screening, trainings, work
from instructjax.labels.judgements import Judgement
from instructjax.labels.labeler_pages import shown_prompt
from instructjax.labels.schema import items
from instructjax.labels.web import NOT_THERE, RESEARCHERS, Asked, Page, Refused, day, go, page

_DAYS = 28  # of the plots, and trainings
_LISTED = 200  # items of the queue


def overview(asked: Asked) -> Response:
  with asked.database.read() as connection:
    found = judgements.read(connection)
    paces = judgements.paces(connection)
    origins = judgements.origins(connection)
    counts = connection.execute(
      sa.select(items.c.kind, items.c.is_screening, sa.func.count(), sa.func.sum(items.c.wanted))
      .group_by(items.c.kind, items.c.is_screening)
      .order_by(items.c.kind)
    ).all()
  labelers = [one for one in found if one.role == "labeler"]
  done = collections.Counter((one.kind, one.is_screening) for one in labelers)
  days = collections.Counter(day(one.at) for one in found)
  return page(
    asked,
    "overview.html",
    kinds=[(kind, is_, number, wanted, done[kind, is_]) for kind, is_, number, wanted in counts],
    paces=paces,
    sizes=judgements.split_sizes(found),
    wins=agreement.win_rates([one.ranks for one in found], origins),
    bars=_bars([(date, days[date]) for date in sorted(days)[-_DAYS:]]),
  )


def _bars(values: Sequence[tuple[str, float]]) -> list[tuple[str, float, float, float]]:
  """(name, value, x in [0, 1), height in [0, 1]) of the bars of a plot."""
  top = max((value for _, value in values), default=0) or 1
  return [(name, value, i / len(values), value / top) for i, (name, value) in enumerate(values)]


def agreement_page(asked: Asked) -> Response:
  with asked.database.read() as connection:
    found = judgements.read(connection)
  ranked, rated = judgements.ranked(found), judgements.rated(found)
  names = sorted({name for one in ranked.values() for name in one})
  by_day: dict[str, list] = {}
  last = {one.item_id: day(one.at) for one in found}
  for item_id, one in ranked.items():
    by_day.setdefault(last[item_id], []).append(one)
  days = [(date, agreement.overall(by_day[date])) for date in sorted(by_day)[-_DAYS:]]
  return page(
    asked,
    "agreement.html",
    overall=agreement.overall(ranked.values()),
    alpha=agreement.alpha([list(one.values()) for one in rated.values()], "ordinal"),
    people=[
      (name, agreement.of_person(ranked.values(), name), agreement.bias(rated.values(), name))
      for name in names
    ],
    pairs=agreement.of_pairs(ranked.values()),
    days=[(date, one) for date, one in days if one.mean is not None],
  )


def trainings_page(asked: Asked) -> Response:
  with asked.database.read() as connection:
    found = trainings.read(connection)
    batches = rounds.states(connection)
  accuracy, agree = trainings.marks(found[-_DAYS:])
  return page(
    asked,
    "trainings.html",
    found=found,
    shown=found[-_DAYS:],
    accuracy=accuracy,
    agree=agree,
    grid=[(share, trainings.height(share)) for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)],
    batches=batches,
  )


def screening_page(asked: Asked) -> Response:
  with asked.database.read() as connection:
    found = judgements.read(connection)
    grades = judgements.grades_by_submission(connection)
    assessed = judgements.self_assessed(connection)
    prompts = {
      row.id: row.prompt for row in connection.execute(sa.select(items.c.id, items.c.prompt))
    }
  return page(
    asked,
    "screening.html",
    candidates=screening.candidates(found, grades, assessed),
    to_grade=[
      (one.submission_id, shown_prompt(prompts[one.item_id]), one.payload["text"])
      for one in found
      if _is_to_grade(one) and one.submission_id not in grades
    ],
    cutoffs=(screening.AGREEMENT, screening.GRADE),
  )


def _is_to_grade(one: Judgement) -> bool:
  return one.is_screening and one.kind == "demonstration" and one.role == "labeler"


def grade(asked: Asked) -> Response:
  value, number = asked.form.get("grade", ""), asked.form.get("submission", "")
  with asked.database.read() as connection:
    known = {str(one.submission_id) for one in judgements.read(connection) if _is_to_grade(one)}
  if value not in list("1234567") or number not in known:
    raise Refused(400, "A grade is 1 to 7, of a demonstration of the screening.")
  judgements.grade(asked.database, int(number), asked.me.id, int(value), asked.now)
  return go("/screening")


def disagreements(asked: Asked) -> Response:
  with asked.database.read() as connection:
    ranked = judgements.ranked(judgements.read(connection))
    prompts = {
      row.id: row.prompt for row in connection.execute(sa.select(items.c.id, items.c.prompt))
    }
  rows = [
    (share, number, len(one), shown_prompt(prompts[number])[-1][1][:200])
    for number, one in ranked.items()
    if (share := agreement.disagreement(one))
  ]
  rows.sort(key=lambda row: (-row[0], row[1]))
  return page(asked, "disagreements.html", rows=rows[:_LISTED], count=len(rows))


def review(asked: Asked) -> Response:
  number = asked.path["number"]
  with asked.database.read() as connection:
    found = projects.get(connection, number)
    said = [one for one in judgements.read(connection) if one.item_id == number]
  if found is None:
    raise Refused(404, NOT_THERE)
  item, answers = found
  return page(
    asked,
    "review.html",
    item=item,
    prompt=shown_prompt(item.prompt),
    answers=answers,
    said=[(one, json.dumps(one.payload, ensure_ascii=False, indent=1)) for one in said],
  )


def take(asked: Asked) -> Response:
  if not work.take(asked.database, asked.me, asked.path["number"], asked.now):
    raise Refused(404, NOT_THERE)
  return go(f"/items/{asked.path['number']}")


def survey(asked: Asked) -> Response:
  return _survey_page(asked, "")


def _survey_page(asked: Asked, message: str) -> Response:
  with asked.database.read() as connection:
    levels = judgements.self_assessed(connection).get(asked.me.name, {})
  return page(asked, "survey.html", subjects=screening.SUBJECTS, levels=levels, message=message)


def answer_survey(asked: Asked) -> Response:
  levels = {
    subject: int(value)
    for i, subject in enumerate(screening.SUBJECTS)
    if (value := asked.form.get(f"subject-{i}", "")) in ("0", "1", "2")
  }
  judgements.say(asked.database, asked.me.id, levels, asked.now)
  return _survey_page(asked, "Your answers are kept.")


ROUTES = (
  Page("GET", "/overview", overview, RESEARCHERS),
  Page("GET", "/agreement", agreement_page, RESEARCHERS),
  Page("GET", "/trainings", trainings_page, RESEARCHERS),
  Page("GET", "/screening", screening_page, RESEARCHERS),
  Page("POST", "/screening", grade, RESEARCHERS),
  Page("GET", "/disagreements", disagreements, RESEARCHERS),
  Page("GET", "/review/{number:number}", review, RESEARCHERS),
  Page("POST", "/review/{number:number}/take", take, ("researcher",)),
  Page("GET", "/survey", survey, ("labeler",)),
  Page("POST", "/survey", answer_survey, ("labeler",)),
)
