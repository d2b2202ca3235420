"""The process that renders chat templates for chat.py, with limits of processor time and memory.

A program of its own: chat.py starts it by its path and speaks with it in lines of JSON. Imports nothing of the project,
so that it starts in a tenth of a second.

A template comes with downloaded weights, so it is untrusted code. Jinja2's sandbox keeps it from the machine but not
from loops without end or strings of gigabytes, and many of those run inside a single operation of Python
(`'x' * 10**9`, `10 ** 10**8`, `'%2000000000d' | format`), where no check inside the same process could stop them. The
operating system can, but its limits belong to a whole process: set in the process that trains, they would end the
training. Therefore templates have a process of their own. One process serves all chats of a run, because starting one
takes longer than rendering a thousand chats.
"""

import contextlib
import datetime
import json
import pathlib
import pprint  # noqa: F401  (imported by jinja2's filter `pprint` only when a template uses it)
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.sandbox

CPU_SECONDS = 0.5  # of one chat, compiling its template included; real templates take milliseconds
MEMORY_BYTES = 256 << 20  # beyond what the process has at its start
MAX_CHARACTERS = 8_000_000  # of a rendered chat; more than the longest context of any model
_KEPT_TEMPLATES = 8  # compiled ones


class Generation(jinja2.ext.Extension):
  """The tag {% generation %}, with which transformers marks the assistant's text. It renders its body unchanged."""

  tags = {"generation"}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
  """Jinja2's namespace without names that begin with an underscore, which could reach Python's own attributes."""

  def __init__(*args, **kwargs):
    self, args = args[0], args[1:]
    entries = dict(*args, **kwargs)
    for name in entries:
      _require_plain(name)
    jinja2.utils.Namespace.__init__(self, entries)

  def __setitem__(self, name, value):
    _require_plain(name)
    jinja2.utils.Namespace.__setitem__(self, name, value)


def _require_plain(name):
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def make_environment() -> jinja2.Environment:
  """The environment that transformers gives a template, less what would render the same chat in two ways.

  The text must be that of transformers to the last space, because the model was trained on it.
  """

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(  # replaces jinja2's own filter, which escapes for HTML
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = tojson
  functions: dict[str, Any] = environment.globals
  functions |= {"raise_exception": raise_exception, "namespace": Namespace}
  # Both draw random numbers. Training would read other prompts than the evaluation after it.
  del environment.filters["random"], functions["lipsum"]
  return environment


def limit():
  """Sets the limits of this process."""
  # No files are written, and no core dump if a limit ends the process.
  for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
    resource.setrlimit(kind, (0, 0))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  pages = pathlib.Path("/proc/self/statm")
  used = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 1 << 30
  with contextlib.suppress(ValueError):  # macOS has no limit of memory
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def answer(environment: jinja2.Environment, compiled: dict, request: dict) -> dict:
  """Renders chats.

  Args:
    environment: from `make_environment`.
    compiled: template's source -> compiled template; changed.
    request: `template`, the source; `clock`, the date and time that it sees, in ISO form; `values`, what it sees of
      every chat; `chats`, the messages of each.
  Returns:
    `results`, a list of one-item dicts: `text`, or `error` with the reason why there is none. Or `limit`, if a limit is
    reached: the process should be ended then, since what is left of its memory is not known.
  """
  results = []
  for messages in request["chats"]:
    # The kernel ends the process when this time is over, whatever Python is doing.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
      results.append(_render(environment, compiled, request, messages))
    except MemoryError:
      return {"limit": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"}
  return {"results": results}


def _render(environment: jinja2.Environment, compiled: dict, request: dict, messages: list) -> dict:
  source, clock = request["template"], datetime.datetime.fromisoformat(request["clock"])
  try:
    if source not in compiled:
      while len(compiled) >= _KEPT_TEMPLATES:
        del compiled[next(iter(compiled))]
      compiled[source] = environment.from_string(source)
    values = {**request["values"], "messages": messages, "strftime_now": clock.strftime}
    text = compiled[source].render(values)
  except MemoryError:
    raise
  except Exception as error:  # a template may raise anything
    return {"error": f"{error}"[:1000] or type(error).__name__}
  if len(text) > MAX_CHARACTERS:
    return {"error": f"it gives {len(text):,} characters, more than {MAX_CHARACTERS:,}"}
  return {"text": text}


def main():
  """Answers requests, a line of JSON each, until there are no more."""
  environment, compiled = make_environment(), {}
  limit()
  for line in sys.stdin.buffer:
    try:
      result = json.dumps(answer(environment, compiled, json.loads(line)))
    except MemoryError:
      result = json.dumps({"limit": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"})
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(result.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()
