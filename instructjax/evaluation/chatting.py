"""Questions of an evaluation as chats, for models that were tuned to be asked so. Called by the command.

As lm-evaluation-harness does it with --apply_chat_template: all of a prompt, worked examples included, is what the user
says, and the answer is the assistant's, without a space before it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.evaluation.task import Ask, Choices

# Chats -> the text of each, or the error; see `controls.Chats.render_all`.
RenderAll = Callable[[Sequence[Sequence[Mapping[str, Any]]]], Iterator[Rendered | UserError]]


def as_chats(render_all: RenderAll, asks: Sequence[Ask]) -> list[Ask]:
  """The same questions, through a model's chat template.

  A continuation without a context stays as it is: nothing is asked there, and the text itself is judged.

  Raises:
    UserError: the template refuses one.
  """
  texts = dict.fromkeys(text for ask in asks for text in _said(ask) if text)
  chats = [[{"role": "user", "content": text}] for text in texts]
  rendered: dict[str, str] = {"": ""}
  for text, result in zip(texts, render_all(chats), strict=True):
    if isinstance(result, UserError):
      raise result
    rendered[text] = result
  return [_put(ask, rendered) for ask in asks]


def _said(ask: Ask) -> list[str]:
  return [context for context, _ in ask.pairs] if isinstance(ask, Choices) else [ask.prompt]


def _put(ask: Ask, rendered: Mapping[str, str]) -> Ask:
  if not isinstance(ask, Choices):
    return dataclasses.replace(ask, prompt=rendered[ask.prompt])
  pairs = (
    (rendered[context], continuation.lstrip() if context else continuation)
    for context, continuation in ask.pairs
  )
  return Choices(tuple(pairs))
