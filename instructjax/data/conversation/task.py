"""The task of the preset `smollm2`: answer what people say to a chat program, kindly and to the point.

Prompts and demonstrations are a package's (text.py). The gold score is the true preference. Labelers (labelers.py) read
it through the ratings of a few people and with noise, and no model is ever trained on it. Called by
`instructjax.data.conversation`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data.conversation import sentiment, text
from instructjax.data.records import Demonstration, Prompt

_PROMPT = "Question: {}\nAnswer:\n"
COMPONENTS = ("tone", "topic", "form", "repetition", "copying", "fluency")
GOLD_WEIGHTS = np.array([2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
# As kind as an answer needs to be, in VADER's range of -1 to 1. Without a bound, gushing would win.
_KIND_ENOUGH = 0.6
_MIN_WORDS, _MAX_WORDS = 4, 20
# What the gold score rewards, for readers of the report.
GOLD_WORDS = (
  "A good answer names what the prompt is about, says something about it in words of its own, says it kindly, is"
  " finished, has 4 to 20 words and reads like English to the untrained model; repeating words and copying the prompt"
  " cost it."
)
# Mean log-probability of a token under the base at which an answer counts as fluent, and the range below it [nats].
_FLUENT_LOGPROB, _FLUENT_RANGE, _FLUENT_FLOOR = -2.5, 1.5, -1.5
_COPIED_SHARE, _COPIED_RUN = 0.7, 5
_OWN_WORDS = 2  # content words besides the prompt's with which an answer says something
_EXAMPLES = 3


def keyed_rng(seed: int, *names: str | int) -> np.random.Generator:
  """A generator of its own for each use, so that a change of one leaves the others' numbers as they are."""
  return np.random.default_rng([seed, *(zlib.crc32(str(name).encode()) for name in names)])


def prompt_of(said: str) -> str:
  """The prompt in which a remark or question stands."""
  return _PROMPT.format(said)


def said_in(prompt: str) -> str:
  """The remark or question of a prompt; of one with worked examples, the last.

  Raises:
    UserError: it is not one of the task's.
  """
  head, tail = _PROMPT.split("{}")
  _, found, rest = prompt.strip().rpartition(head.strip() + " ")
  said, end, after = rest.partition(tail.strip())
  if not found or not end or after:
    raise UserError(
      f"prompt={prompt.splitlines()[:1]!r} is not one of the conversations'; score only prompts of"
      f" the form {_PROMPT!r}"
    )
  return said.strip()


def prompts(split: str) -> list[Prompt]:
  """The prompts of a split in a fixed order, each once.

  Raises:
    ValueError: there is no such split.
    UserError: the conversations cannot be read.
  """
  return [Prompt(prompt=prompt_of(said)) for said in text.prompts_of(split)]


def demonstrations(split: str, seed: int) -> list[Demonstration]:
  """The answers of a split, in an order drawn by the seed.

  Raises:
    ValueError: there is no such split.
    UserError: the conversations cannot be read.
  """
  found = [Demonstration(prompt_of(pair.said), pair.answer) for pair in text.pairs_of(split)]
  return [found[i] for i in keyed_rng(seed, "demonstrations", split).permutation(len(found))]


def few_shot_prompt(prompt: str, seed: int = 0, num_examples: int = _EXAMPLES) -> str:
  """Puts worked examples of the training split before a prompt, the same kind of lines as the prompt itself.

  A base model goes on after its answer, so callers should cut its output at the first newline.

  Raises:
    UserError: the prompt is not one of the task's, or the conversations cannot be read.
  """
  pairs, rng = text.pairs_of("train"), keyed_rng(seed, "few_shot", said_in(prompt))
  chosen = [pairs[i] for i in rng.choice(len(pairs), size=num_examples, replace=False)]
  return "".join(f"{prompt_of(pair.said)}{pair.answer}\n" for pair in chosen) + prompt


def is_new_topic(prompt: str) -> bool:
  """No: people's prompts have no topics that could be held out as a whole. The test prompts are one group.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  said_in(prompt)
  return False


# --- Gold score ----------------------------------------------------------------------------------


def topic_count(prompt: str, response: str) -> int:
  """How often an answer says a content word of the prompt, the one that it says most often.

  `dream` counts for `dreams`, and `dreams` for `dream`.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  topic, said = map(_stem, text.content_words(said_in(prompt))), text.words(response)
  stems = [_stem(word) for word in said]
  return max((stems.count(one) for one in topic), default=0)


def names_topic(prompt: str, response: str) -> bool:
  """Whether an answer says a content word of the prompt, as `topic_count` counts.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  return topic_count(prompt, response) > 0


def _stem(word: str) -> str:
  return word.removesuffix("'s").removesuffix("s")


def gold_components(
  prompts: str | Sequence[str],
  responses: Sequence[str],
  logprob_N: np.ndarray,
  rating: tuple[int, ...] = sentiment.ALL,
) -> np.ndarray:
  """Computes the components of the true preference. There is one row per response, with columns as in COMPONENTS.

  tone        VADER's compound score, at most .6, over .6: -1.7 to 1. A kind word counts in an answer that names the
              topic, else 0: it would fit any prompt. A harsh one counts in every answer.
  topic       for an answer that names what the prompt is about: 0, .5 or 1 for none, one or more content words that
              the prompt has not. `I am not a robot.` says nothing about robots.
  form        1 for a finished answer of 4 to 20 words, else -1.
  repetition  -.75 for each content word or word pair that is said again, at least -3.
  copying     -2 for an answer that is mostly the prompt's words, or that repeats five of them in a row.
  fluency     1 for text as likely under the frozen base as people's, less for less likely text, at least -1.5.

  Args:
    prompts: one prompt for all responses, or a prompt for each response.
    responses: answers as text; an answer may be empty.
    logprob_N: mean log-probability of each response's tokens under the frozen base, after its prompt [nats].
    rating: the columns of VADER's ratings by which the tone is read.
  Raises:
    UserError: the numbers of prompts and responses differ, a prompt is not one of the task's, or VADER is missing.
  """
  if isinstance(prompts, str):
    prompts = [prompts] * len(responses)
  if not len(prompts) == len(responses) == len(logprob_N):
    raise UserError(
      f"got {len(prompts)} prompts and {len(logprob_N)} log-probabilities for {len(responses)} responses;"
      " give one prompt, or one of each for every response"
    )
  components = np.empty((len(responses), len(COMPONENTS)))
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    words = text.words(response)
    tone = min(sentiment.compound(response, rating), _KIND_ENOUGH) / _KIND_ENOUGH
    on_topic = names_topic(prompt, response)
    components[i, :5] = (
      tone if on_topic else min(tone, 0.0),
      on_topic * _own_words(prompt, response) / _OWN_WORDS,
      _form(response, words),
      _repetition(words),
      _copying(text.words(said_in(prompt)), words),
    )
  fluent = 1.0 + (np.asarray(logprob_N) - _FLUENT_LOGPROB) / _FLUENT_RANGE
  components[:, 5] = np.clip(fluent, _FLUENT_FLOOR, 1.0)
  return components


def score_without_base(prompts: str | Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """As `gold_score`, with every response taken for fluent."""
  return gold_score(prompts, responses, np.full(len(responses), _FLUENT_LOGPROB))


def _own_words(prompt: str, response: str) -> int:
  """How many content words of an answer its prompt has not, at most as many as it needs."""
  said = set(map(_stem, text.words(said_in(prompt))))
  return min(len(set(map(_stem, text.content_words(response))) - said), _OWN_WORDS)


def _form(response: str, words: list[str]) -> float:
  """1 for a finished answer of a fit length, else -1."""
  return 1.0 if response[-1:] in ".!?" and _MIN_WORDS <= len(words) <= _MAX_WORDS else -1.0


def _repetition(words: list[str]) -> float:
  """-.75 for each thing said again. The larger of two counts: repeated content words, and repeated word pairs."""
  content = [word for word in words if text.content_words(word)]
  couples = list(zip(words, words[1:]))
  again = max(len(content) - len(set(content)), len(couples) - len(set(couples)))
  return -0.75 * min(again, 4)


def _copying(said: list[str], words: list[str]) -> float:
  """-2 for an answer that hands the prompt back."""
  shared = sum(word in said for word in words) / max(len(words), 1)
  run = min(_COPIED_RUN, len(said))
  runs = {tuple(said[i : i + run]) for i in range(len(said) - run + 1)}
  repeats = any(tuple(words[i : i + run]) in runs for i in range(len(words) - run + 1))
  return -2.0 if shared > _COPIED_SHARE or repeats else 0.0


def gold_score(
  prompts: str | Sequence[str], responses: Sequence[str], logprob_N: np.ndarray
) -> np.ndarray:
  """The true preference for each response. Arguments and errors as in `gold_components`.

  A kind and fluent answer that names the topic scores 5, the same without the topic 3, an echo of the prompt about 2.
  """
  return gold_components(prompts, responses, logprob_N) @ GOLD_WEIGHTS
