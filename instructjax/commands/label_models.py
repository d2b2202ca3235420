"""The models of the labeling application: answers for `label sample`, and one that answers in the playground.

Called by label.py. Imports JAX, which takes seconds, so label.py imports it only where a model is asked for.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from instructjax.core import places
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.data import controls
from instructjax.data.records import Chat, Prompt
from instructjax.evaluation import language_model
from instructjax.evaluation.language_model import LanguageModel, Request
from instructjax.labels import projects
from instructjax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How answers are drawn.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    max_new_tokens: the most tokens of an answer.
    seed: the same seed gives the same answers.
    chat: whether a text is a user's message in the chat template, or text to go on from; None, as for `generate`: a
      message where the tokenizer has a template. Prompts that are messages always are.
  """

  temperature: float
  max_new_tokens: int
  seed: int
  chat: bool | None = None


def _open(name: str) -> LanguageModel:
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=1, tensor=1), jax.devices())
  return language_model.open_model(places.require(name, "--checkpoint", places.WEIGHTS), mesh)


def answers(
  prompts: Sequence[Prompt], times: int, names: Sequence[str], k: int, how: Sampling
) -> list[tuple[tuple[str, str], ...]]:
  """(text, checkpoint) of the answers of each item: `times` for each prompt, all prompts once and then again.

  Args:
    prompts: what is answered.
    times: items made of each prompt.
    names: checkpoints, which share the k answers of an item.
    k: answers of each item.
    how: see Sampling.
  Raises:
    UserError: a model cannot be opened, leaves no room for a prompt, or has no template where there must be one.
  """
  found: list[list[tuple[str, str]]] = [[] for _ in range(len(prompts) * times)]
  for number, name in enumerate(names):
    # Each model gives its part of the k; the first ones give one more where it does not divide.
    samples = range(number, k, len(names))
    model = _open(name)
    texts = [_text(model, name, record.prompt, how.chat) for record in prompts]
    requests = [
      Request(
        texts[i % len(prompts)],
        (),
        how.max_new_tokens,
        how.temperature,
        # No two answers to a prompt have the same, in whichever of its items.
        seed=how.seed + i // len(prompts) * projects.MOST_ANSWERS + sample,
      )
      for i in range(len(found))
      for sample in samples
    ]
    for i, answer in enumerate(language_model.generate(model, requests)):
      found[i // len(samples)].append((answer.strip(), name))
  return [tuple(own) for own in found]


def _text(model: LanguageModel, name: str, prompt: str | Chat, chat: bool | None) -> str:
  """What the model reads: a chat in the tokenizer's template; see Sampling.

  Raises:
    UserError: a text is to be a message, and the tokenizer has no template.
  """
  tokenizer = model.tokenizer
  if isinstance(prompt, str):
    if not controls.reads_messages(tokenizer.chats, chat, name):
      return prompt
    prompt = Chat((("user", prompt),))
  return tokenizer.chats.render_one(
    [{"role": role, "content": content} for role, content in prompt.messages]
  )


def answerer(names: Sequence[str], how: Sampling) -> Callable[[str], str]:
  """The function that answers prompts of the playground, with the first of its programs compiled already.

  Args:
    names: the checkpoint, which must be one.
    how: see Sampling; the seed is that of the first prompt, and each further one has another.
  Raises:
    UserError: there is not exactly one checkpoint, or it cannot be opened or answer.
  """
  if len(names) != 1:
    raise UserError(
      f"--playground needs one --checkpoint, the model that answers; got {len(names)}"
    )
  model, seed = _open(names[0]), how.seed

  def answer(prompt: str) -> str:
    nonlocal seed
    read = _text(model, names[0], prompt, how.chat)
    request = Request(read, (), how.max_new_tokens, how.temperature, seed=seed)
    seed += 1
    return language_model.generate(model, [request])[0].strip()

  answer("Hello")
  return answer
