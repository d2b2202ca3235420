"""Damaged and hostile chat templates, and what rendering a chat with one must do."""

import json
import pathlib
import random
import re
from collections.abc import Iterator

from instructjax.core.errors import UserError
from instructjax.data import chat, chat_files
from tests.fuzz import mutants
from tests.fuzz.mutants import Files

CONFIG = "tokenizer_config.json"
MESSAGES = "messages.json"
TEMPLATES = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
  "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
  "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
  "{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% endfor %}",
  "{%- set ns = namespace(found=false, names=[]) -%}{%- for m in messages -%}{%- set ns.found = true -%}"
  "{{ m | tojson }}{%- endfor -%}{%- if not date is defined -%}{%- set date = strftime_now('%d %b %Y') -%}"
  "{%- endif -%}{{ date }}{% generation %}{{ eos_token }}{% endgeneration %}",
  "{% macro turn(m, depth=0) %}{{ '%s: %s' | format(m.role, m.content) }}{% endmacro %}"
  "{% for m in messages %}{{ turn(m) }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
  "{{ messages | map(attribute='role') | join(', ') }}",
)
# What replaces a piece of a template. The last few run into a limit, which takes half a second.
PIECES = (
  *("{{", "}}", "{%", "%}", "{#", "-%}", "'", '"', "(", ")", "[", "]", "|", ".", ",", "\n", "\0"),
  *("messages", "loop", "none", "true", "-1", "0", "1e999", "'x' * 9", "''", "\ud83d", "\x1b[31m"),
  *("messages[99]", "m.content.nothing", "m['content'][::-1]", "self", "self.__class__", "x.y.z"),
  *("cycler", "joiner", "range(9)", "dict(a=1)", "lipsum()", "namespace()", "namespace(_a=1)"),
  *("{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends messages %}", "{% set x"),
  *("raise_exception('a\nb\x1b[2J')", "raise_exception('é' * 5000)", "strftime_now(5)"),
  *("strftime_now('%' * 99)", "strftime_now('\\x00')", "messages | tojson(indent=messages)"),
  *("messages.append(1)", "{}.update", "().__class__.__bases__", "'{0.__class__}'.format(1)"),
  *("m | attr('__class__')", "1 / 0", "9 ** 9 ** 3", "'a' | int", "[] | first", "messages | sum"),
)
HOSTILE = ("'x' * 10 ** 10", "10 ** 10 ** 8", "range(10 ** 9) | list", "'%2000000000d' | format(1)")
_SHARE = 0.002  # of hostile templates
_TOKEN = re.compile(r"\{\{|\}\}|\{%-?|-?%\}|\w+|\s+|[^\w\s]")
_TEXTS = ("Hi.", "", "a\n\nb ", "{{ 7 * 7 }}", "{% raw %}", "é\U0001f642", "<|im_end|>", "\ud83d")
_ROLES = ("user", "assistant", "system", "tool", "")


def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
  """Yields (what it is, a template as its own file or in tokenizer_config.json, and messages) without end."""
  while True:
    template = _mutated(rng, rng.choice(TEMPLATES))
    messages = [
      {"role": rng.choice(_ROLES[: rng.choice((2, 2, 5))]), "content": rng.choice(_TEXTS)}
      for _ in range(rng.choice((0, 1, 1, 2, 3)))
    ]
    files = {MESSAGES: json.dumps(messages or [{"role": "user", "content": "Hi."}]).encode()}
    content = template.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
      content = mutants.damaged(rng, content)
    if rng.random() < 0.6:
      files[chat_files.TEMPLATE] = content
    else:
      named = [{"name": rng.choice(("default", "default", "tool_use")), "template": template}]
      entry = template if rng.random() < 0.5 else named
      config = json.dumps({"chat_template": entry}).encode()
      files[CONFIG] = mutants.json_text(rng, config, ("name", "template", "chat_template", ""))
    yield content[:60].decode("utf-8", "replace"), files


def _mutated(rng: random.Random, template: str) -> str:
  tokens = _TOKEN.findall(template)
  for _ in range(rng.choice((0, 1, 1, 2, 3))):
    at = rng.randrange(len(tokens))
    piece = rng.choice(HOSTILE if rng.random() < _SHARE else PIECES)
    kind = rng.randrange(4)
    if kind == 0:
      tokens[at] = piece
    elif kind == 1:
      tokens.insert(at, piece)
    elif kind == 2:
      del tokens[at : at + rng.choice((1, 1, 3))]
      tokens = tokens or [""]
    else:
      tokens[at:at] = ["{{ " + piece + " }}"]
  return "".join(tokens)


def run(folder: pathlib.Path):
  """Finds the template and renders the chat.

  Raises:
    UserError: the template or the messages are refused.
    AssertionError: the text is none.
  """
  config = folder / CONFIG
  try:
    entry = json.loads(config.read_bytes())["chat_template"] if config.exists() else None
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise UserError("no JSON; special_tokens reads it, which is another target") from error
  where, template = chat_files.find(folder, config, entry)
  chats = [json.loads((folder / MESSAGES).read_bytes())]
  special = ("<|im_start|>", "<|im_end|>")
  results = chat.render(
    template, chats, where=where, bos="<s>", eos="<|im_end|>", special=special, named=(), clock=None
  )
  text = chat.only(results)
  assert text.strip() and text.encode()
