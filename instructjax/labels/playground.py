"""The playground: a page on which users write prompts to an earlier model, and may let the project keep them (sec 3.2).

Called by serving.py. The model and the library that takes personal data out are given to it by the command.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable

from starlette.responses import Response

from instructjax.core.errors import UserError
from instructjax.labels import prompts
from instructjax.labels.web import NOT_THERE, Asked, Page, Refused, go, page

ROLES = ("user", "researcher", "admin")
LONGEST = 8000  # letters of a prompt
_A_MINUTE, _A_DAY = 10, 500  # prompts that a user may send
_WAITING = 8  # users who may wait for the model at once
_PATIENCE = 60.0  # seconds that each of them waits


class Limits:
  """Counts what each user has sent in the last day. It is kept in memory only: nothing is stored without consent."""

  def __init__(self):
    self._sent: dict[int, collections.deque[float]] = {}
    self._lock = threading.Lock()

  def may_send(self, user_id: int, now: float) -> bool:
    """Whether a user may send another prompt, which is then counted."""
    with self._lock:
      times = self._sent.setdefault(user_id, collections.deque())
      while times and times[0] <= now - 86_400.0:
        times.popleft()
      recent = sum(at > now - 60.0 for at in times)
      if recent >= _A_MINUTE or len(times) >= _A_DAY:
        return False
      times.append(now)
      return True


class Model:
  """A model that answers one prompt at a time.

  Args:
    answer: prompt -> answer.
  """

  def __init__(self, answer: Callable[[str], str]):
    self._answer, self._lock = answer, threading.Lock()
    self._seats = threading.BoundedSemaphore(_WAITING)

  def answer(self, prompt: str) -> str | None:
    """The answer; None if too many wait.

    Raises:
      UserError: the model cannot answer.
    """
    if not self._seats.acquire(blocking=False):
      return None
    try:
      if not self._lock.acquire(timeout=_PATIENCE):
        return None
      try:
        return self._answer(prompt)
      finally:
        self._lock.release()
    finally:
      self._seats.release()


@dataclasses.dataclass(frozen=True)
class Playground:
  """What the page needs beside the database.

  Attributes:
    model: answers.
    strip: takes what looks like personal data out of a text.
    limits: of what users may send.
  """

  model: Model
  strip: Callable[[str], str]
  limits: Limits = dataclasses.field(default_factory=Limits)


def _open(asked: Asked) -> Playground:
  found = asked.site.playground
  if found is None:
    raise Refused(404, NOT_THERE)
  return found


def _shown(asked: Asked, status: int = 200, **values) -> Response:
  given = {"prompt": "", "answer": None, "problem": "", "kept": "", "text": "", "consents": False}
  own = prompts.of_user(asked.database, asked.me)
  return page(asked, "playground.html", status, own=own, most=prompts.MOST, **given | values)


def form(asked: Asked) -> Response:
  _open(asked)
  return _shown(asked)


def ask(asked: Asked) -> Response:
  """Answers a prompt, and keeps it if the box is ticked."""
  playground = _open(asked)
  text = asked.form.get("prompt", "").replace("\r\n", "\n").replace("\r", "\n")
  consents = asked.form.get("consent") == "yes"
  filled = {"prompt": text[:LONGEST], "consents": consents}
  problem, status = "", 400
  if not text.strip() or "\0" in text:
    problem = "Write a prompt, without NUL characters."
  elif len(text) > LONGEST:
    problem = (
      f"A prompt may have at most {LONGEST} letters; yours has {len(text)}, and is cut below."
    )
  elif not playground.limits.may_send(asked.me.id, asked.now):
    problem, status = "That was a lot of prompts. Wait a while and send it again.", 429
  if problem:
    return _shown(asked, status, problem=problem, **filled)
  try:
    answer = playground.model.answer(text)
  except UserError:
    return _shown(asked, 400, problem="The model cannot answer this prompt.", **filled)
  if answer is None:
    return _shown(
      asked, 503, problem="Many people are asking. Send it again in a moment.", **filled
    )
  kept = stripped = ""
  if consents:
    stripped = playground.strip(text).strip()
    kept = prompts.keep(asked.database, asked.me, stripped, asked.now)
  return _shown(asked, answer=answer, kept=kept, text=stripped, **filled)


def forget(asked: Asked) -> Response:
  _open(asked)
  number = asked.form.get("number", "")
  is_number = number.isdecimal() and len(number) < 10
  if not is_number or not prompts.forget(asked.database, asked.me, int(number), asked.now):
    raise Refused(404, NOT_THERE)
  return go("/playground")


ROUTES = (
  Page("GET", "/playground", form, ROLES),
  Page("POST", "/playground", ask, ROLES),
  Page("POST", "/playground/forget", forget, ROLES),
)
