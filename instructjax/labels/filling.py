"""Fills a project with what was ranked and written elsewhere: by other tools' annotators, or by simulated labelers.

Called by the command. Whoever is named becomes a person of the project, who cannot sign in.
"""

import collections
import dataclasses
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.messages import quoted
from instructjax.data.records import Demonstration, Ranking
from instructjax.labels import accounts, projects, schema
from instructjax.labels.schema import Database, answers, assignments, items, submissions, users

NOBODY = "imported"  # ranks what has no labeler; imported_2 the same answers once more, and so on
_ROUND = (
  10**6
)  # a simulated labeler's noise goes by the number of the ranking, see stages/collect.py
_MOST_ROUNDS = 50


@dataclasses.dataclass(frozen=True)
class Done:
  """Finished work to put into the database."""

  item_id: int
  person: str
  payload: dict[str, Any]


def record(database: Database, work: Iterable[Done], now: float, cohort: str = "training"):
  """Adds finished work in a transaction of its own; arguments as of `record_to`."""
  with database.write() as connection:
    record_to(connection, work, now, cohort)


def record_to(
  connection: sa.Connection, work: Iterable[Done], now: float, cohort: str = "training"
):
  """Adds finished work.

  Args:
    connection: a transaction that writes.
    work: no person has done the item before.
    now: the time.
    cohort: of people who are not in the project yet.
  """
  schema.one_at_a_time(connection)  # so that numbers of submissions rise as they become visible
  work = list(work)
  people = connection.execute(sa.select(users.c.name, users.c.id))
  numbers: dict[str, int] = {name: number for name, number in people}
  for name in sorted({done.person for done in work} - numbers.keys()):
    numbers[name] = accounts.add_to(connection, name, "labeler", "", now, cohort)
  for part in (work[i : i + 500] for i in range(0, len(work), 500)):
    connection.execute(
      assignments.insert(),
      [
        {
          "item_id": done.item_id,
          "user_id": numbers[done.person],
          "state": "done",
          "token": secrets.token_urlsafe(16),
          "opened": now,
          "touched": now,
          "reason": "",
        }
        for done in part
      ],
    )
    connection.execute(
      submissions.insert(),
      [
        {
          "item_id": done.item_id,
          "user_id": numbers[done.person],
          "token": secrets.token_urlsafe(16),
          "payload": json.dumps(done.payload, sort_keys=True),
          "seconds": 0.0,
          "at": now,
        }
        for done in part
      ],
    )


def bring_in(database: Database, spec: str, kind: str, now: float) -> tuple[int, int]:
  """Adds the comparisons or demonstrations of a source, and returns the numbers of items and of submissions.

  All come in or, if anything goes wrong, none. Rankings of the same answers to the same prompt are one item.

  Args:
    database: the project's.
    spec: as data.comparisons takes it: `jsonl:` also reads Label Studio's and Argilla's exports, `hh:` pairs.
    kind: comparisons or demonstrations.
    now: the time.
  Raises:
    UserError: the source cannot be read, a labeler has ranked the same answers twice, two labelers would have one
      account, or one would have another's.
  """
  if kind not in ("comparisons", "demonstrations"):
    raise UserError("--kind must be comparisons or demonstrations")
  loaded = sources.load(
    spec,
    kind,
    "all",
    seed=0,
    validation_fraction=0.5,
    on_bad_record="raise",
    setting="--from",
  )
  found = [one for one in loaded if isinstance(one, Ranking | Demonstration)]
  together: dict[Any, list[Any]] = {}
  for number, one in enumerate(found):
    same = number if isinstance(one, Demonstration) else tuple(sorted(one.responses))
    together.setdefault((projects.as_json(one.prompt), same), []).append(one)
  groups = list(together.values())
  for group in groups:
    count = len(getattr(group[0], "responses", ()))
    if count > projects.MOST_ANSWERS:
      raise UserError(
        f"{group[0].where}: it ranks {count} answers, and an item holds at most {projects.MOST_ANSWERS}"
      )
  people = _people(groups)
  new = [
    projects.Item(
      "ranking" if isinstance(group[0], Ranking) else "demonstration",
      group[0].prompt,
      tuple((text, "imported") for text in getattr(group[0], "responses", ())),
      wanted=len(group),
    )
    for group in groups
  ]
  with database.write() as connection:
    numbers = projects.add_to(connection, new, now)
    order = _answers_in(connection)
    done = [
      Done(number, name, _payload(one, order.get(number, [])))
      for number, group, names in zip(numbers, groups, people, strict=True)
      for one, name in zip(group, names, strict=True)
    ]
    _require_own(connection, done, "training", "give the labeler another name in the file")
    record_to(connection, done, now)
  return len(new), len(done)


def _people(groups: Sequence[Sequence[Ranking | Demonstration]]) -> list[list[str]]:
  """The account of each record's labeler, by group of rankings of the same answers to the same prompt.

  Whoever has no name gets one that nobody else has in the group: several people may have ranked its answers.

  Raises:
    UserError: two labelers would have one account, or one has ranked the same answers twice.
  """
  known: dict[str, str] = {}  # account -> labeler
  for one in itertools.chain.from_iterable(groups):
    if labeler := _labeler(one):
      account = _account(labeler)
      if known.setdefault(account, labeler) != labeler:
        raise UserError(
          f"{one.where}: labelers {quoted(known[account], 90)} and {quoted(labeler, 90)} would both have the account"
          f" {account}: rename one of them in the file"
        )
  result = []
  for group in groups:
    numbered = itertools.chain([NOBODY], (f"{NOBODY}_{number}" for number in itertools.count(2)))
    nameless = (name for name in numbered if name not in known)
    names = [_account(_labeler(one)) if _labeler(one) else next(nameless) for one in group]
    if twice := {name for name in names if names.count(name) > 1}:
      raise UserError(f"{group[0].where}: {min(twice)} has ranked the same answers twice")
    result.append(names)
  return result


def _labeler(one: Ranking | Demonstration) -> str:
  return (one.labeler if isinstance(one, Ranking) else None) or ""


def _account(labeler: str) -> str:
  """A name that an account can have."""
  name = re.sub(r"^\W|[^\w.@+-]", "_", labeler)[:80]
  return name if accounts.may_be_named(name) else f"_{name}"


def _require_own(connection: sa.Connection, work: Iterable[Done], cohort: str, remedy: str):
  """Sees to it that work is credited to nobody else of the same name.

  Raises:
    UserError: a person of this name signs in to the project, or is of another cohort, whose work is used otherwise.
  """
  names = {done.person for done in work}
  for person in connection.execute(sa.select(users).order_by(users.c.name)).all():
    is_others = person.password or person.cohort != cohort
    if person.name in names and is_others:
      whose = "signs in" if person.password else f"is of the cohort {person.cohort}"
      raise UserError(
        f"labeler {person.name} has the name of a person of the project who {whose}, and who would be credited with"
        f" the rankings: {remedy}"
      )


def _answers(database: Database) -> dict[int, list[sa.Row]]:
  """Number of an item -> its answers in order."""
  with database.read() as connection:
    return _answers_in(connection)


def _answers_in(connection: sa.Connection) -> dict[int, list[sa.Row]]:
  rows = connection.execute(sa.select(answers).order_by(answers.c.item_id, answers.c.position))
  result: dict[int, list[sa.Row]] = {}
  for row in rows:
    result.setdefault(row.item_id, []).append(row)
  return result


def _payload(one: Ranking | Demonstration, order: Sequence[sa.Row]) -> dict[str, Any]:
  if isinstance(one, Demonstration):
    return {"text": one.response}
  left = list(zip(one.responses, one.ranks, strict=True))
  found = {}
  for answer in order:
    place = next(i for i, (text, _) in enumerate(left) if text == answer.text)
    found[str(answer.id)] = {"rank": left.pop(place)[1], "note": ""}
  return {"answers": found}


def simulate(database: Database, spec: str, group: str, seed: int, now: float) -> tuple[int, int]:
  """Lets the labelers of a simulated task rank what is still wanted.

  They rank as in the stage `collect`. Overall quality goes by the rank, and no yes/no question is answered.

  Args:
    database: a project whose prompts are the task's.
    spec: demo:, as yet the only task whose labelers need no model.
    group: train; or heldout for other labelers, who rank the held-out items once more.
    seed: determines the labelers, who ranks what, and their noise.
    now: the time.
  Returns:
    Numbers of rankings added, and of those that are wanted by more people than there are.
  Raises:
    UserError: the source is no simulated task, a prompt is not one of the task's, or a labeler has another's name.
  """
  simulation = sources.require_simulation(spec)
  if simulation.READS_BASE:
    raise UserError(
      f"--simulation={spec} must be demo:, whose labelers need no model to judge answers"
    )
  order, is_extra = _answers(database), group == "heldout"
  people = {person.id: person for person in accounts.everybody(database)}
  with database.read() as connection:
    query = sa.select(items).where(items.c.kind == "ranking").order_by(items.c.id)
    found = connection.execute(query).all()
    taken: dict[int, set[str]] = {item.id: set() for item in found}
    counted = collections.Counter()  # item -> people who train
    for row in connection.execute(sa.select(assignments)):
      taken.setdefault(row.item_id, set()).add(people[row.user_id].name)
      counted[row.item_id] += row.state != "skipped" and people[row.user_id].cohort == "training"
  for item in found:
    if not isinstance(json.loads(item.prompt), str):
      raise UserError(f"item {item.id} is of a chat, and simulated labelers know texts only")
  if is_extra:
    found = [item for item in found if item.split == "validation"]
  wanted = {item.id: 1 if is_extra else max(0, item.wanted - counted[item.id]) for item in found}
  done: list[Done] = []
  for round_ in range(_MOST_ROUNDS):
    open_ = [item for item in found if wanted[item.id] > 0]
    if not open_:
      break
    asked = [
      (json.loads(item.prompt), [answer.text for answer in order[item.id]]) for item in open_
    ]
    ranked = simulation.collect_rankings(asked, group, seed, _ROUND * round_)
    for item, ranking in zip(open_, ranked, strict=True):
      if ranking.labeler not in taken[item.id]:
        taken[item.id].add(ranking.labeler)
        wanted[item.id] -= 1
        done.append(Done(item.id, ranking.labeler, _rated(order[item.id], ranking.ranks)))
  cohort = "heldout" if is_extra else "training"
  with database.read() as connection:
    _require_own(connection, done, cohort, "simulate in a project without this person")
  record(database, done, now, cohort)
  return len(done), sum(wanted.values())


def _rated(order: Sequence[sa.Row], ranks: Sequence[int]) -> dict[str, Any]:
  last = max(max(ranks) - 1, 1)
  return {
    "answers": {
      str(answer.id): {"overall": 7 - round(6 * (rank - 1) / last), "note": "", "rank": rank}
      for answer, rank in zip(order, ranks, strict=True)
    }
  }
