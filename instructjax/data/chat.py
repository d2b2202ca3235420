"""Converts chat messages to the text that a model was trained to read, with the model's own jinja2 template.

Called by tokenizer, bpe and stages/pipeline.py. Imports nothing of the project but the errors.

A template comes with the weights and is therefore untrusted code. It runs in jinja2's sandbox, in a process of its own
with limits of time and memory (chat_worker.py), and sees only plain strings. Whatever it raises is reported as an error
in its file.
"""

import atexit
import datetime
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from instructjax.core.errors import UserError
from instructjax.core.text import printable

Text = TypeVar("Text", bound=str)

_WORKER = pathlib.Path(__file__).with_name("chat_worker.py")
_BATCH = 256  # chats of one request to the worker
_BATCH_CHARACTERS = 1_000_000  # after so many in its messages, a batch is full too
# Python keeps half of a UTF-16 pair, as "\ud83d" in JSON, as a character of its own, which cannot be encoded.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_REASON = 200  # characters of a template's own error message
Text = TypeVar("Text", bound=str)


def now() -> str:
  """The local date and time, as a template's clock: ISO 8601 in seconds, without a time zone."""
  return datetime.datetime.now().isoformat(timespec="seconds")


def has_clock(template: str | None) -> bool:
  """Whether a template asks for the date, so that its text depends on the day."""
  return template is not None and "strftime_now" in template


@functools.cache
def _first_now() -> str:
  """The time at which this process first rendered a chat without a clock of its own."""
  return now()


def render(
  template: str | None,
  chats: Sequence[Sequence[Mapping]],
  *,
  where: pathlib.Path,
  bos: str | None,
  eos: str | None,
  special: Iterable[str],
  named: Iterable[tuple[str, str]],
  clock: str | None,
) -> Iterator[str | UserError]:
  """The text of each chat up to the point where the assistant speaks next, as transformers renders it.

  Args:
    template: jinja2 source; None if the tokenizer has no template.
    chats: lists of messages, which are mappings with a role ('system', 'user', 'assistant') and a content, both
      strings.
    where: the template's file, for messages.
    bos: text of the token that begins a text, passed to the template; None leaves it undefined.
    eos: text of the token that ends a turn, passed to the template; None leaves it undefined.
    special: texts of all special tokens. No message may contain one, because it could end its own turn and continue in
      another role.
    named: names and texts of further tokens that the template may use, as ("pad_token", "<pad>").
    clock: date and time that the template sees, in the form of `now`. None is the time of the first chat of this
      process, so that the date does not change within a conversation.
  Yields:
    For each chat its text; or the error, if there is no template or it refuses the chat, a message has another form,
    or one contains a special token.
  Raises:
    UserError: the template exceeds a limit of chat_worker.
  """
  if template is None:
    reason = "has no chat template, which chat messages need; give prompts as text instead"
    yield from (UserError(f"{where} {reason}") for _ in chats)
    return
  known = {"bos_token": bos, "eos_token": eos}
  values = {
    **dict(named),
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
    **{name: token for name, token in known.items() if token is not None},
  }
  request = {"template": template, "values": values, "clock": clock or _first_now()}
  for batch in _batches(chats):
    errors = [_error(messages, special) for messages in batch]
    fit = [_plain(messages) for messages, error in zip(batch, errors) if error is None]
    answer = _worker(os.getpid()).ask({**request, "chats": fit})
    if "limit" in answer:
      raise UserError(f"{where}: the chat template fails: {answer['limit']}")
    results = iter(answer["results"])
    for error in errors:
      yield error or _text(next(results), where)


def only(results: Iterator[Text | UserError]) -> Text:
  """The text of a single chat that was given to `render`.

  Raises:
    UserError: it has none.
  """
  (result,) = results
  if isinstance(result, UserError):
    raise result
  return result


def _batches(chats: Sequence[Sequence[Mapping]]) -> Iterator[list[Sequence[Mapping]]]:
  """Cuts a list of chats into batches. Asking the worker for one chat takes longer than rendering it."""
  batch, size = [], 0
  for messages in chats:
    batch.append(messages)
    size += sum(len(str(message.get("content", ""))) for message in messages)
    if len(batch) == _BATCH or size > _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _plain(messages: Sequence[Mapping]) -> list[dict[str, str]]:
  return [{"role": message["role"], "content": message["content"]} for message in messages]


def _text(result: Mapping[str, str], where: pathlib.Path) -> str | UserError:
  """The text in a chat's result, or the error."""
  if "error" in result:
    reason = printable(" ".join(result["error"].split()))
    if len(reason) > _LONGEST_REASON:
      reason = reason[:_LONGEST_REASON] + "..."
    return UserError(f"{where}: the chat template fails: {reason}")
  text = result["text"]
  if not text.strip():
    return UserError(f"{where}: the chat template gives no text for these messages")
  if _LONE_SURROGATE.search(text):
    return UserError(f"{where}: the chat template gives half of a surrogate pair, which is no text")
  return text


def _error(messages: Sequence[Mapping], special: Iterable[str]) -> UserError | None:
  """What is wrong with the messages of a chat, if anything is."""
  if not messages:
    return UserError("a chat must have at least one message")
  for number, message in enumerate(messages, start=1):
    for name in ("role", "content"):
      value = message.get(name)
      if not isinstance(value, str):
        return UserError(f"message {number} of a chat must have a {name}, which is text")
      if _LONE_SURROGATE.search(value):
        return UserError(
          f"message {number} of a chat must not hold half of a surrogate pair in its {name}: it is no text"
        )
      for token in special:
        if token in value:
          return UserError(
            f"message {number} of a chat must not hold the special token {token!r} in its {name}"
          )
  return None


class _Worker:
  """The running chat_worker.py. It is started when it is first asked, and again after it has ended."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self._lock = threading.Lock()
    atexit.register(self.close)

  def ask(self, request: Mapping) -> dict:
    """Sends a request and waits for its answer, see chat_worker.answer."""
    line = json.dumps(request).encode() + b"\n"
    with self._lock:
      try:
        return self._exchange(line)
      except BaseException:
        # For example Ctrl-C: the next request must not get the answer to this one.
        self.close()
        raise

  def _exchange(self, line: bytes) -> dict:
    if self._process is None or self._process.poll() is not None:
      self.close()
      self._process = _start()
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin is not None and stdout is not None
    try:
      stdin.write(line)
      stdin.flush()
      answer = stdout.readline()
    except BrokenPipeError:
      answer = b""
    if answer.endswith(b"\n"):
      result = json.loads(answer)
      if "limit" in result:
        self.close()
      return result
    code = self._process.wait()
    if code >= 0:
      raise RuntimeError(f"{_WORKER} ended with exit code {code}")
    if code == -signal.SIGPROF:
      return {"limit": "it takes more than half a second of processor time"}
    return {"limit": f"its process was ended by {signal.Signals(-code).name}"}

  def close(self):
    """Ends the process. The next request starts another."""
    process, self._process = self._process, None
    if process is not None:
      process.kill()
      process.communicate()


@functools.cache
def _worker(process_id: int) -> _Worker:
  """The worker of this process; a forked process must not share its parent's."""
  return _Worker()


def _start() -> subprocess.Popen:
  # -P: its folder holds modules with names of Python's own, as tokenize. In a session of its own, because Ctrl-C stops
  # an answer, and the worker ends by itself when this process does. Hashes without a seed keep the order of sets.
  return subprocess.Popen(
    [sys.executable, "-P", str(_WORKER)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=os.environ | {"PYTHONHASHSEED": "0"},
    start_new_session=True,
  )
