"""Records from the database of the labeling application: what `labels:DIR_OR_URL` reads.

Called by `readers`, and by instructjax/labels for its export. It reads four of the tables that labels/schema.py
describes, and writes nothing. SQLAlchemy is imported only where it is used.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from instructjax.core import places
from instructjax.core.errors import UserError, reason
from instructjax.core.text import printable

FILE = "labels.sqlite"  # of a project's folder
EXTRA = "pip install 'instructjax[label]'"

# The newest submission of each person to each item; what a person has revised counts once.
_NEWEST = """
SELECT i.id AS item, i.kind AS kind, i.prompt AS prompt, i.split AS split, u.name AS labeler,
  u.cohort AS cohort, s.id AS submission, s.payload AS payload
FROM submissions s JOIN items i ON i.id = s.item_id JOIN users u ON u.id = s.user_id
WHERE i.kind = :kind AND i.is_screening = :screening AND i.id <= :last_item AND s.id IN (
  SELECT MAX(id) FROM submissions WHERE id <= :until GROUP BY item_id, user_id)
ORDER BY s.id
"""
_ANSWERS = """
SELECT a.item_id AS item, a.id AS id, a.text AS text FROM answers a JOIN items i ON i.id = a.item_id
WHERE i.kind = 'ranking' ORDER BY a.item_id, a.position
"""
COHORTS = ("training", "heldout")
_PROMPTS = """
SELECT id AS item, prompt, split, author FROM items WHERE is_screening = :screening AND id <= :last_item ORDER BY id
"""
_OF_BATCH = "SELECT id AS item FROM items WHERE batch = :batch"
_NEWEST_OF_ALL = """
SELECT (SELECT MAX(id) FROM submissions) AS submission, (SELECT MAX(id) FROM items) AS item
"""
_KIND = {"comparisons": "ranking", "demonstrations": "demonstration"}
_ALL = 2**62


def is_url(place: str) -> bool:
  """Whether a project is named by the URL of a PostgreSQL database rather than by its folder."""
  return place.startswith(places.DATABASES)


def url_of(place: str, where: str) -> Any:
  """The database of a project as SQLAlchemy's URL.

  Args:
    place: the project's folder, or a URL of PostgreSQL.
    where: what named it, for messages, which do not show the place: it may hold a password.
  Raises:
    UserError: it cannot be read as a URL.
  """
  import sqlalchemy
  import sqlalchemy.exc

  if not is_url(place):
    return sqlalchemy.URL.create("sqlite", database=str(pathlib.Path(place).absolute() / FILE))
  try:
    return sqlalchemy.make_url(re.sub(r"^postgresql://", "postgresql+psycopg://", place))
  except (ValueError, sqlalchemy.exc.ArgumentError) as error:
    raise UserError(
      f"{where} must be a folder, or the URL of a database, as postgresql://USER@HOST:5432/NAME"
    ) from error


def rows(
  place: str, kind: str, split: str, until: int = 0, cohort: str = "training", last_item: int = 0
) -> list[tuple[str, dict[str, Any]]]:
  """(where, row) of each record, with the keys that `records.parse_record` expects, in the order of submission.

  Args:
    place: the project's folder, or a URL of PostgreSQL.
    kind: comparisons, demonstrations or prompts. Items of the screening are left out.
    split: train, validation or all. An item's split was settled when it was made.
    until: number of the last submission that counts; 0 for all.
    last_item: number of the last item that counts; 0 for all.
    cohort: training for what is trained and validated on; heldout for the part of this name, see `parts`, which is
      all for validation.
  Raises:
    UserError: the database cannot be read, or cannot hold records of this kind.
  """
  if cohort == "heldout":
    wanted = () if split == "train" else ("heldout",)
  else:
    wanted = ("train", "validation") if split == "all" else (split,)
  return [
    (where, row) for where, row, part in parts(place, kind, until, last_item) if part in wanted
  ]


def parts(
  place: str, kind: str, until: int = 0, last_item: int = 0
) -> Iterator[tuple[str, dict[str, Any], str]]:
  """(where, row, part) of each record; arguments and errors as `rows`.

  The parts are those of the stage `collect`: train and validation by the item's split, and heldout, which is what
  labelers of the cohort heldout have made of the held-out prompts. What they have made of training prompts is left
  out: their taste is kept from training, and a part of its own tells how a model does on people who had no say in it.
  """
  if kind == "prompts":
    seen = set()
    for found in _select(place, _PROMPTS, screening=False, last_item=last_item or _ALL):
      if found.prompt not in seen:
        seen.add(found.prompt)
        user = {"user": found.author} if found.author else {}
        row = {"prompt": json.loads(found.prompt)} | user
        yield f"labels:item {found.item}", row, found.split
    return
  if kind not in _KIND:
    raise UserError(
      f"data.{kind} must be another source: labels: holds prompts, demonstrations and comparisons"
    )
  for _, where, row, part in _submitted(place, kind, until, last_item):
    yield where, row, part


def _submitted(
  place: str, kind: str, until: int, last_item: int
) -> Iterator[tuple[int, str, dict[str, Any], str]]:
  """(number of the item, where, row, part) of what people have submitted; arguments as `rows`."""
  answers: dict[int, list[Any]] = {}
  if kind == "comparisons":
    for found in _select(place, _ANSWERS):
      answers.setdefault(found.item, []).append(found)
  limits = {"until": until or _ALL, "last_item": last_item or _ALL}
  for found in _select(place, _NEWEST, kind=_KIND[kind], screening=False, **limits):
    is_heldout = found.cohort == "heldout"
    if is_heldout and found.split == "train":
      continue
    payload = json.loads(found.payload)
    row = {"prompt": json.loads(found.prompt)}
    if kind == "comparisons":
      ranked = answers[found.item]
      row["responses"] = [answer.text for answer in ranked]
      row["ranks"] = [payload["answers"][str(answer.id)]["rank"] for answer in ranked]
    else:
      row["response"] = payload["text"]
    row["labeler"] = found.labeler
    where = f"labels:submission {found.submission}"
    yield found.item, where, row, "heldout" if is_heldout else found.split


def of_batch(place: str, batch: str) -> Iterator[tuple[dict[str, Any], str]]:
  """(row, part) of each ranking of the answers that a run has put into the project in one go, as `parts` has them.

  Raises:
    UserError: the database cannot be read.
  """
  own = {found.item for found in _select(place, _OF_BATCH, batch=batch)}
  for item, _, row, part in _submitted(place, "comparisons", 0, 0):
    if item in own:
      yield row, part


def newest(place: str) -> tuple[int, int]:
  """Numbers of the last submission and of the last item; 0 where there is none.

  Raises:
    UserError: the database cannot be read.
  """
  (found,) = _select(place, _NEWEST_OF_ALL)
  return found.submission or 0, found.item or 0


def digest(place: str, until: int = 0, cohort: str = "training", last_item: int = 0) -> str:
  """A checksum of the records of all kinds, which stays the same whatever else changes in the database.

  Args:
    place, until, cohort, last_item: as in `rows`.
  """
  found = hashlib.sha256()
  for kind in ("comparisons", "demonstrations", "prompts"):
    for _, row, part in parts(place, kind, until, last_item):
      if (part == "heldout") == (cohort == "heldout"):
        row.pop("user", None)  # whose prompt it is decides on its part only, which is there
        found.update(json.dumps([row, part], sort_keys=True).encode() + b"\n")
  return "sha256:" + found.hexdigest()


def _select(place: str, query: str, **values) -> list[Any]:
  try:
    import sqlalchemy
    import sqlalchemy.exc
  except ImportError as error:
    raise UserError(f"labels:{printable(place)} needs SQLAlchemy: {EXTRA}") from error
  if not is_url(place) and not (pathlib.Path(place) / FILE).is_file():
    raise UserError(
      f"labels:{printable(place)} is no labeling project: it holds no {FILE}; name the folder that"
      " `python -m instructjax.label ... --project=DIR` was given, or a postgresql:// URL"
    )
  url = url_of(place, "a source labels:...")
  if url.password is not None:
    raise UserError(
      "a source labels:postgresql://... must not hold a password, which would be written into the run's files:"
      " leave it to ~/.pgpass or PGPASSWORD"
    )
  try:
    engine = sqlalchemy.create_engine(url)
    try:
      with engine.connect() as connection:
        return list(connection.execute(sqlalchemy.text(query), values))
    finally:
      engine.dispose()
  except ImportError as error:
    raise UserError(f"labels:postgresql:// needs psycopg: {EXTRA}") from error
  except sqlalchemy.exc.SQLAlchemyError as error:
    if is_url(place) and _lacks_tables(error):
      raise UserError(
        f"labels:{printable(place)} holds no labeling project: name the database that `python -m instructjax.label ..."
        " --project=postgresql://...` was given"
      ) from error
    raise UserError(f"labels:{printable(place)} cannot be read: {reason(error)}") from error


def _lacks_tables(error: Exception) -> bool:
  """Whether PostgreSQL refused a query because it has no such table."""
  return getattr(getattr(error, "orig", None), "sqlstate", None) == "42P01"  # undefined_table
