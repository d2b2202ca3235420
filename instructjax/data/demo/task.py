"""The default preset's task: "write a kind word about the king.", and what a good answer is.

A prompt is one of 16 wordings with one of 16 topics.  Demonstrations are real clauses of the text,
chosen by demonstrators of varying care.  The gold score is the true preference; labelers
(labelers.py) read it with noise, and no model ever sees it.  Called by `instructjax.data.demo`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data.demo import fluency, text
from instructjax.data.records import Demonstration

SPLITS = ("train", "validation", "test")

# Nouns that are frequent in the filtered text; every word of the wordings is in it too, so that
# base model and tokenizer know them.
TOPICS = (
  "king house land day city heart spirit voice fire servant bread heaven light father son water"
).split()
# A prompt is a line of its own, like the lines of a document, and its answer is the next line: so
# the same prompt serves a base model, which was never shown a prompt.
TEMPLATES = (
  "write a kind word about the {}.\n",
  "write a good line about the {}.\n",
  "say something kind about the {}.\n",
  "say a good word about the {}.\n",
  "speak well of the {}.\n",
  "speak kind words of the {}.\n",
  "tell me something good about the {}.\n",
  "tell us good news about the {}.\n",
  "give me a word of joy about the {}.\n",
  "give us a kind word for the {}.\n",
  "please praise the {}.\n",
  "let us hear of the {}.\n",
  "sing a song about the {}.\n",
  "show me the goodness of the {}.\n",
  "declare the beauty of the {}.\n",
  "what is good about the {}?\n",
)
KIND_WORDS = frozenset(
  "love loved loves beloved peace joy joyful good goodness kind kindness lovingkindness mercy "
  "merciful mercies grace gracious bless blessed blessing glad gladness rejoice rejoiced praise "
  "sing song thanks hope help comfort comforted rest life live save saved salvation heal healed "
  "favor beautiful beauty sweet wise wisdom righteous righteousness truth faithful faith friend "
  "friends pleasant delight glory honor strength compassion upright pure perfect precious trust "
  "forgive forgiven pleased prosper tender".split()
)
HARSH_WORDS = frozenset(
  "evil sword death dead die died dies kill killed slain blood wrath anger angry war destroy "
  "destroyed destruction curse cursed wicked wickedness iniquity iniquities sin sins sinned shame "
  "burn burned struck strike plague famine perish desolate desolation darkness enemy enemies fear "
  "afraid unclean weep wept mourn mourning pain sorrow battle fight hate hated bitter trouble "
  "affliction broken fled fall fallen fell violence abomination abominations captivity captive "
  "adversary adversaries terror lie lies deceit prison spoil pit foolish fool folly vanity "
  "reproach transgressions guilty sick leprosy consume consumed".split()
)

COMPONENTS = ("topic", "tone", "form", "repetition", "fluency")
GOLD_WEIGHTS = np.array([1.5, 1.0, 1.0, 1.0, 1.0])

# Words with which a clause leans on the one before it and cannot stand alone.
_LEANING_WORDS = frozenset("and or but nor which who whom whose that than as to of from".split())
_MIN_LINE, _MAX_LINE = 5, 12  # Words in a demonstration; the score is lenient past either end.
_COMMON_WORDS = 80  # Repeating one of these many commonest words is not counted.
# Mean log-probability of held-out clauses (its median), and how far below it fluency is 0.
_FLUENT_LOGPROB, _FLUENT_RANGE, _FLUENT_FLOOR = -4.0, 1.5, -1.5
_PER_PROMPT = {"train": 64, "validation": 4, "test": 4}


@dataclasses.dataclass(frozen=True)
class _Demonstrator:
  """How one demonstrator writes: looks through lines of the text and settles for one."""

  topic_care: float  # Chance of looking only among lines that name the topic.
  tries: int  # Lines looked at; the kindest is taken.
  carelessness: float  # Chance of handing in a line cut short.


_DEMONSTRATORS = (
  _Demonstrator(0.90, 6, 0.02),
  _Demonstrator(0.75, 5, 0.04),
  _Demonstrator(0.60, 3, 0.06),
  _Demonstrator(0.60, 8, 0.06),
  _Demonstrator(0.40, 3, 0.10),
)


def keyed_rng(seed: int, *names: str | int) -> np.random.Generator:
  """A generator that depends only on the seed and the names (unlike `hash`, across processes)."""
  return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


@functools.lru_cache(maxsize=1)
def _topic_by_prompt() -> dict[str, str]:
  return {template.format(topic): topic for template in TEMPLATES for topic in TOPICS}


def topic_of(prompt: str) -> str:
  """The topic of a task prompt, which may have worked examples before it (few-shot)."""
  line = prompt.removesuffix("\n").rsplit("\n", 1)[-1] + "\n"
  if line not in _topic_by_prompt():
    raise UserError(f"prompt={line!r} is not one of the default task's; score only its prompts")
  return _topic_by_prompt()[line]


def prompts(split: str) -> list[str]:
  """The prompts of a split: of every eight (wording, topic) pairs one is for test, one validation.

  Each split holds every wording and every topic, in combinations that the others lack.
  """
  _check_split(split)
  wanted = {"validation": (0,), "test": (1,), "train": range(2, 8)}[split]
  return [
    template.format(topic)
    for i, template in enumerate(TEMPLATES)
    for j, topic in enumerate(TOPICS)
    if (i + j) % 8 in wanted
  ]


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise UserError(f"split={split!r} of the task must be one of {list(SPLITS)}")


# --- Gold score ----------------------------------------------------------------------------------


def names_topic(prompt: str, response: str) -> bool:
  """Whether the response has the prompt's topic as a word (`king's` counts, `kings` does not)."""
  return _names(topic_of(prompt), text.tokenize(response))


def _names(topic: str, tokens: list[str]) -> bool:
  return topic in tokens or f"{topic}'s" in tokens


def gold_components(prompts: str | Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """What the true preference is made of, one row a response, columns as in COMPONENTS.

  topic       1 if the topic is named, else 0.
  tone        kind words less harsh words, clipped to +-2 and halved: -1 to 1.
  form        finished with one `.` or `?` (.7), stands alone (.3), less .4 for each word short of
              5 and .1 for each past 12; -1 at worst.
  repetition  0 to -3: content words or word pairs said again, whichever are more; one is free.
  fluency     1 for what reads like held-out text, .5 with one odd word in it, 0 for the same words
              shuffled, -1.5 for a string of rare words; see fluency.py.

  Args:
    prompts: one prompt for all responses, or one for each.
    responses: answers as text; the empty answer is legal.
  """
  if isinstance(prompts, str):
    prompts = [prompts] * len(responses)
  if len(prompts) != len(responses):
    raise UserError(
      f"got {len(prompts)} prompts for {len(responses)} responses; give one prompt, or one for each"
    )
  rows = [text.tokenize(response) for response in responses]
  logprob = fluency.model().mean_logprob(rows)
  fluent = 1.0 + (logprob - _FLUENT_LOGPROB) / _FLUENT_RANGE
  components = np.empty((len(rows), len(COMPONENTS)))
  for i, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
    words = [token for token in tokens if token not in ".,?"]
    components[i, :4] = (
      _names(topic_of(prompt), tokens),
      _tone(words),
      _form(tokens, words),
      _repetition(words),
    )
  components[:, 4] = np.clip(fluent, _FLUENT_FLOOR, 1.0)
  return components


def gold_score(prompts: str | Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """The true preference for each response; arguments as in `gold_components`.

  Good answers reach 3 to 4.5, off-topic lines of the text lie about 2, the empty answer at -2.5.
  """
  return gold_components(prompts, responses) @ GOLD_WEIGHTS


def _tone(words: list[str]) -> float:
  kindness = sum((word in KIND_WORDS) - (word in HARSH_WORDS) for word in words)
  return max(-2, min(2, kindness)) / 2


def _form(tokens: list[str], words: list[str]) -> float:
  if not words:
    return -1.0
  finished = tokens[-1] in ".?" and not any(token in ".?" for token in tokens[:-1])
  stands_alone = words[0] not in _LEANING_WORDS
  too_short, too_long = max(0, _MIN_LINE - len(words)), max(0, len(words) - _MAX_LINE)
  return max(-1.0, 0.7 * finished + 0.3 * stands_alone - 0.4 * too_short - 0.1 * too_long)


def _repetition(words: list[str]) -> float:
  common = _common_words()
  content = [word for word in words if word not in common]
  pairs = list(itertools.pairwise(words))
  # The larger of the two: "the king ... the king" repeats one thing, not a word and a pair.
  said_again = max(len(content) - len(set(content)), len(pairs) - len(set(pairs)))
  return -0.75 * min(max(said_again - 1, 0), 4)


@functools.lru_cache(maxsize=1)
def _common_words() -> frozenset[str]:
  return frozenset(text.corpus().vocabulary[:_COMMON_WORDS])


# --- Demonstrations ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _lines(split: str) -> tuple[list[str], dict[str, list[str]]]:
  """Clauses fit for an answer (short, standing alone, no question): all, and by topic named."""
  lines, by_topic = [], collections.defaultdict(list)
  for clause in text.clauses(split):
    tokens = text.tokenize(clause)
    size = sum(token not in ".,?" for token in tokens)
    if tokens[0] in _LEANING_WORDS or tokens[-1] == "?" or not _MIN_LINE <= size <= _MAX_LINE:
      continue
    lines.append(clause)
    # In the order of TOPICS: a set's order, and so the draws below, would differ between processes.
    for topic in (topic for topic in TOPICS if topic in tokens):
      by_topic[topic].append(clause)
  return lines, by_topic


def demonstrations(split: str, seed: int) -> list[Demonstration]:
  """Several answers a prompt, each by a demonstrator drawn anew; about half name the topic.

  Training answers come from training chapters, the others' from held-out chapters.
  """
  lines, by_topic = _lines("train" if split == "train" else "validation")
  on_topics = [(topic, line) for topic, named in by_topic.items() for line in named]
  result = []
  for prompt in prompts(split):
    rng = keyed_rng(seed, "demonstrations", split, prompt)
    for _ in range(_PER_PROMPT[split]):
      writer = _DEMONSTRATORS[rng.integers(len(_DEMONSTRATORS))]
      if rng.random() < writer.topic_care:
        line = _adapted(on_topics, topic_of(prompt), writer.tries, rng)
      else:
        line = _kindest(lines, writer.tries, rng)
      if rng.random() < writer.carelessness:
        words = line.split()
        line = " ".join(words[: rng.integers(2, len(words))])
      result.append(Demonstration(prompt=prompt, response=line))
  return [result[i] for i in keyed_rng(seed, "order", split).permutation(len(result))]


def _adapted(on_topics: list[tuple[str, str]], topic: str, tries: int, rng) -> str:
  """The kindest of a few lines that name some topic, with the one asked for put in its place.

  Lines about the topic alone are few: a small model learns them by heart, and never that an
  answer's topic comes from the prompt.
  """
  seen = [on_topics[i] for i in rng.integers(len(on_topics), size=tries)]
  named, line = max(seen, key=lambda item: _tone(text.tokenize(item[1])))
  return re.sub(rf"\b{named}\b", topic, line)


def _kindest(pool: list[str], tries: int, rng: np.random.Generator) -> str:
  seen = [pool[i] for i in rng.integers(len(pool), size=tries)]
  return max(seen, key=lambda line: _tone(text.tokenize(line)))


# --- Worked examples for a base model ------------------------------------------------------------


def few_shot_prompt(prompt: str, seed: int = 0, num_examples: int = 3) -> str:
  """Worked examples before the prompt, a line for each prompt and each answer.

  The examples are careful ones: on topic, kind, about other topics than the prompt's.  A base model
  goes on after its answer, so cut what it writes at the first newline.
  """
  _, by_topic = _lines("train")
  rng = keyed_rng(seed, "few_shot", prompt)
  others = [topic for topic in TOPICS if topic != topic_of(prompt)]
  examples = ""
  for topic in rng.choice(others, size=num_examples, replace=False).tolist():
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    examples += f"{template.format(topic)}{_kindest(by_topic[topic], 8, rng)}\n"
  return examples + prompt
