"""Converts chat messages to the text that a model was trained to read, with the model's own jinja2 template.

Called by tokenizer and bpe. Imports nothing of the project but the errors.

A template comes with the weights and is therefore untrusted code. It runs in jinja2's sandbox and sees only plain
strings. Whatever it raises is reported as an error in its file.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from instructjax.core.errors import UserError, one_line


def render(
  template: str | None,
  messages: Sequence[Mapping],
  *,
  where: pathlib.Path,
  bos: str | None,
  eos: str | None,
  special: Iterable[str],
) -> str:
  """The text of a chat up to the point where the assistant speaks next, as transformers renders it.

  Args:
    template: jinja2 source; None if the tokenizer has no template.
    messages: mappings with a role ('system', 'user', 'assistant') and a content, both strings.
    where: the template's file, for messages.
    bos: text of the token that begins a text, passed to the template; None leaves it undefined.
    eos: text of the token that ends a turn, passed to the template; None leaves it undefined.
    special: texts of all special tokens. No message may contain one, because it could end its own turn and continue in
      another role.
  Raises:
    UserError: there is no template, it fails, a message has another form, or it contains a special token.
  """
  if template is None:
    raise UserError(
      f"{where} has no chat template, which chat messages need; give prompts as text instead"
    )
  _check(messages, special)
  known = {"bos_token": bos, "eos_token": eos}
  try:
    return _compile(template).render(
      messages=[{"role": message["role"], "content": message["content"]} for message in messages],
      tools=None,
      documents=None,
      add_generation_prompt=True,
      **{name: token for name, token in known.items() if token is not None},
    )
  except Exception as error:  # a template may raise anything
    raise UserError(f"{where}: the chat template fails: {one_line(error)}") from error


def _check(messages: Sequence[Mapping], special: Iterable[str]):
  if not messages:
    raise UserError("a chat must have at least one message")
  for number, message in enumerate(messages, start=1):
    for name in ("role", "content"):
      if not isinstance(message.get(name), str):
        raise UserError(f"message {number} of a chat must have a {name}, which is text")
      for token in special:
        if token in message[name]:
          raise UserError(
            f"message {number} of a chat must not hold the special token {token!r} in its {name}"
          )


@functools.lru_cache
def _compile(template: str):
  # Imported here because a run without chats does not need jinja2.
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """The tag {% generation %}, with which transformers marks the assistant's text. It renders its body unchanged."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(  # replaces jinja2's own filter, which escapes for HTML
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  # The options and functions that transformers gives a template. The text must be the same to the last space, because
  # the model was trained on it.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = tojson
  functions = {
    "raise_exception": raise_exception,
    "strftime_now": lambda form: datetime.datetime.now().strftime(form),
  }
  return environment.from_string(template, globals=functions)
