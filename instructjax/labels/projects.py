"""A project's settings and items: what people are asked to do.

Called by the command and by what fills a project from elsewhere.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from instructjax.core.errors import UserError
from instructjax.data.messages import quoted
from instructjax.data.records import Chat
from instructjax.labels import schema
from instructjax.labels.forms import FORMS
from instructjax.labels.schema import Database, answers, items

SOURCES = ("labeler", "customer")
MOST_ANSWERS = 9  # of the paper
LONGEST_AUTHOR = 80  # letters, see schema.items
_USER = re.compile(r"^(u[0-9]+):[0-9a-f]{16}$")  # of a playground, see prompts.author
# Share of prompts that are held out, as data.validation_fraction has it.
HELD_OUT = 0.05
DEFAULTS = {
  "title": "Labeling",
  "instructions": "",
  "warning": "",
  "held_out": str(HELD_OUT),
}


@dataclasses.dataclass(frozen=True)
class Item:
  """Something to label.

  Attributes:
    kind: one of FORMS.
    prompt: a text, or messages.
    answers: (text, origin) of each output; none for a demonstration.
    source: one of SOURCES, who wrote the prompt.
    author: who wrote the prompt, by whom prompts are split; '' to split by the prompt.
    is_screening: whether it is there to compare labelers with researchers.
    wanted: number of people who are to work on it.
    split: the side of the split, if the prompt is new; '' for that of `split_of`.
    batch: what a run has put here in one go, see rounds.py.
  """

  kind: str
  prompt: str | Chat
  answers: tuple[tuple[str, str], ...] = ()
  source: str = "labeler"
  author: str = ""
  is_screening: bool = False
  wanted: int = 1
  split: str = ""
  batch: str = ""


def settings(database: Database) -> dict[str, str]:
  """The project's settings, with defaults for those that nobody has set."""
  with database.read() as connection:
    return _settings(connection)


def _settings(connection: sa.Connection) -> dict[str, str]:
  own = schema.settings.c.name.in_(DEFAULTS)
  found = connection.execute(sa.select(schema.settings).where(own)).all()
  return DEFAULTS | {row.name: row.value for row in found}


def change(database: Database, values: dict[str, str]):
  """Sets some of the project's settings.

  Raises:
    UserError: held_out is no fraction, or there are items already, whose splits are settled.
  """
  if "held_out" in values:
    try:
      is_fraction = 0 < float(values["held_out"]) < 1
    except ValueError:
      is_fraction = False
    if not is_fraction:
      raise UserError(f"held_out={quoted(values['held_out'], 40)} must be between 0 and 1")
  with database.write() as connection:
    if "held_out" in values and connection.execute(sa.select(items.c.id).limit(1)).first():
      raise UserError("held_out must be set before there are items: their splits are settled")
    for name, value in values.items():
      connection.execute(schema.settings.delete().where(schema.settings.c.name == name))
      connection.execute(schema.settings.insert().values(name=name, value=value))


def as_json(prompt: str | Chat) -> str:
  """A prompt as the database holds it."""
  if isinstance(prompt, str):
    return json.dumps(prompt, ensure_ascii=False)
  messages = [{"role": role, "content": content} for role, content in prompt.messages]
  return json.dumps(messages, ensure_ascii=False)


def split_of(item: Item, held_out: float) -> str:
  """The side on which an item falls, if its prompt is new: all of an author's prompts are on one.

  Without an author it is the side that data/sources.py gives a record with this prompt.
  """
  # Without a project's token: users stay on the side on which they were before projects had one.
  key = _USER.sub(r"\1", item.author)
  if not key:
    messages = item.prompt.messages if isinstance(item.prompt, Chat) else None
    key = (
      item.prompt
      if isinstance(item.prompt, str)
      else json.dumps(messages, ensure_ascii=False, separators=(",", ":"))
    )
  drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
  return "validation" if drawn < held_out * 2**64 else "train"


def add(database: Database, new: Sequence[Item], now: float, seed: int = 0) -> list[int]:
  """Adds items in a transaction of their own, see `add_to`."""
  with database.write() as connection:
    return add_to(connection, new, now, seed)


def add_to(connection: sa.Connection, new: Sequence[Item], now: float, seed: int = 0) -> list[int]:
  """Adds items, and returns their numbers. Answers are shuffled, so that their order tells nothing of their origin.

  An item with the prompt of another is on the same side of the split, whoever its author is.

  Raises:
    UserError: see `require_whole`.
  """
  for item in new:
    require_whole(item)
  schema.one_at_a_time(connection)
  held_out = float(_settings(connection)["held_out"])
  rng = random.Random(seed)
  numbers = []
  sides: dict[str, str] = {
    row.prompt: row.split for row in connection.execute(sa.select(items.c.prompt, items.c.split))
  }
  for item in new:
    prompt = as_json(item.prompt)
    number = schema.insert(
      connection,
      items,
      kind=item.kind,
      prompt=prompt,
      source=item.source,
      author=item.author,
      split=sides.setdefault(prompt, item.split or split_of(item, held_out)),
      is_screening=item.is_screening,
      wanted=item.wanted,
      created=now,
      batch=item.batch,
    )
    numbers.append(number)
    shuffled = rng.sample(item.answers, len(item.answers))
    # A model may say NUL, which neither PostgreSQL nor a record of training holds.
    rows = [
      {
        "item_id": number,
        "position": i,
        "text": text.replace("\0", "\ufffd"),
        "origin": origin[:400],
      }
      for i, (text, origin) in enumerate(shuffled)
    ]
    if rows:
      connection.execute(answers.insert(), rows)
  return numbers


def require_whole(item: Item):
  """Checks an item.

  Raises:
    UserError: a value is not allowed, or it has the wrong number of answers for its kind.
  """
  if item.kind not in FORMS:
    raise UserError(f"kind {quoted(item.kind, 40)} must be one of {', '.join(FORMS)}")
  if item.source not in SOURCES:
    raise UserError(f"source {quoted(item.source, 40)} must be one of {', '.join(SOURCES)}")
  if item.wanted < 1:
    raise UserError(f"wanted={item.wanted} must be at least 1: the people who work on an item")
  if len(item.author) > LONGEST_AUTHOR:
    raise UserError(
      f"user {quoted(item.author, 40)} must have at most {LONGEST_AUTHOR} letters: it is a name or a number"
    )
  count, ranks = len(item.answers), FORMS[item.kind].ranks
  if ranks and not 2 <= count <= MOST_ANSWERS:
    raise UserError(f"an item of kind {item.kind} needs 2 to {MOST_ANSWERS} answers, got {count}")
  if not ranks and count:
    raise UserError(f"an item of kind {item.kind} has no answers, got {count}")


def get(connection: sa.Connection, number: int) -> tuple[Any, list[Any]] | None:
  """(item, its answers in order); None if there is no such item."""
  item = connection.execute(sa.select(items).where(items.c.id == number)).first()
  if item is None:
    return None
  rows = connection.execute(
    sa.select(answers).where(answers.c.item_id == number).order_by(answers.c.position)
  )
  return item, list(rows)
