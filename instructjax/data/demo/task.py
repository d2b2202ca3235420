"""The task of the default preset, with prompts such as "write a kind word about the king." and a measure of quality.

A prompt combines one of 16 wordings with one of 16 topics. Demonstrations are real clauses of the text, chosen by
simulated demonstrators who are more or less careful. The gold score is the true preference. Labelers (labelers.py) read
it with noise, and no model is ever trained on it. Called by `instructjax.data.demo`.
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

# Nouns that are frequent in the filtered text. All words of the wordings occur in it as well, so that the base model
# and the tokenizer know them.
TOPICS = (
  "king house land day city heart spirit voice fire servant bread heaven light father son water"
).split()
# Topics of test prompts only: no prompt that a model is trained on, ranked for or chosen by is about one of them.
NEW_TOPICS = "earth people soul sea".split()
# A prompt is one line, like the lines of a document, and its answer is the next line. A base model, which has never
# seen a prompt, can therefore be given the same prompts.
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

COMPONENTS = ("topic", "tone", "form", "repetition", "copying", "fluency")
GOLD_WEIGHTS = np.array([2.0, 1.0, 1.0, 1.0, 1.0, 1.5])

GOLD_WORDS = (
  "A good answer names the prompt's topic, says kind things of it, is one whole line of 5 to 12 words and reads like"
  " the training text; repeating words and copying the prompt cost it."
)

# A clause that begins with one of these words continues the clause before it and cannot stand alone.
_LEANING_WORDS = frozenset("and or but nor which who whom whose that than as to of from".split())
# Number of words in a demonstration. The gold score penalises answers outside this range gradually.
_MIN_LINE, _MAX_LINE = 5, 12
_COMMON_WORDS = 80  # repetitions of this many most frequent words are not counted
# The median of the mean log-probability of held-out clauses, at which fluency is 1; the distance below it at which
# fluency is 0; and the lowest fluency.
_FLUENT_LOGPROB, _FLUENT_RANGE, _FLUENT_FLOOR = -4.0, 1.5, -1.5
_PER_PROMPT = {"train": 64, "validation": 4, "test": 4}


@dataclasses.dataclass(frozen=True)
class _Demonstrator:
  """A simulated demonstrator, who looks at some lines of the text and hands in the kindest one."""

  topic_care: float  # probability of making the answer name the topic
  tries: int  # number of lines looked at
  carelessness: float  # probability of handing in a truncated line


_DEMONSTRATORS = (
  _Demonstrator(0.90, 6, 0.02),
  _Demonstrator(0.75, 5, 0.04),
  _Demonstrator(0.60, 3, 0.06),
  _Demonstrator(0.60, 8, 0.06),
  _Demonstrator(0.40, 3, 0.10),
)


def keyed_rng(seed: int, *names: str | int) -> np.random.Generator:
  """A random generator that depends only on the seed and the names.

  It is keyed by CRC-32, because Python's `hash` of a string differs between processes.
  """
  return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


@functools.lru_cache(maxsize=1)
def _topic_by_prompt() -> dict[str, str]:
  return {
    template.format(topic): topic for template in TEMPLATES for topic in (*TOPICS, *NEW_TOPICS)
  }


def topic_of(prompt: str) -> str:
  """The topic of a prompt. Worked examples may precede the prompt (few-shot).

  Raises:
    UserError: the prompt is not one of the task's.
  """
  line = prompt.removesuffix("\n").rsplit("\n", 1)[-1] + "\n"
  if line not in _topic_by_prompt():
    raise UserError(f"prompt={line!r} is not one of the default task's; score only its prompts")
  return _topic_by_prompt()[line]


def prompts(split: str) -> list[str]:
  """The prompts of a split.

  Of every eight (wording, topic) pairs, six are for training, one is for validation and one for test. Every wording and
  every topic occurs in each split, but no combination occurs in two. The test split ends with as many prompts about
  `NEW_TOPICS`, which occur in no other split: every other pair of them with a wording.

  Raises:
    ValueError: there is no such split.
  """
  _check_split(split)
  wanted = {"validation": (0,), "test": (1,), "train": range(2, 8)}[split]
  pairs = [
    (template, topic)
    for i, template in enumerate(TEMPLATES)
    for j, topic in enumerate(TOPICS)
    if (i + j) % 8 in wanted
  ]
  if split == "test":
    pairs += [
      (template, topic)
      for i, template in enumerate(TEMPLATES)
      for j, topic in enumerate(NEW_TOPICS)
      if (i + j) % 2 == 0
    ]
  return [template.format(topic) for template, topic in pairs]


def is_new_topic(prompt: str) -> bool:
  """Whether the prompt's topic occurs in no prompt of training or validation.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  return topic_of(prompt) in NEW_TOPICS


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise ValueError(f"split={split!r} of the task must be one of {list(SPLITS)}")


# --- Gold score ----------------------------------------------------------------------------------


def names_topic(prompt: str, response: str) -> bool:
  """Whether the response contains the prompt's topic as a word (`king's` counts, `kings` does not).

  Raises:
    UserError: the prompt is not one of the task's.
  """
  return _names(topic_of(prompt), text.tokenize(response))


def topic_count(prompt: str, response: str) -> int:
  """How often the response names the prompt's topic, counted as in `names_topic`.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  topic, tokens = topic_of(prompt), text.tokenize(response)
  return tokens.count(topic) + tokens.count(f"{topic}'s")


def _names(topic: str, tokens: list[str]) -> bool:
  return topic in tokens or f"{topic}'s" in tokens


def gold_components(prompts: str | Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """Computes the components of the true preference. There is one row per response, with columns as in COMPONENTS.

  topic       1 if the response names the topic, else 0.
  tone        the number of kind words minus the number of harsh words, clipped to +-2 and halved: -1 to 1. Kind words
              count only if the response names the topic: praise of something else is not what was asked for.
  form        .7 if the response ends in its only `.` or `?`, plus .3 if it does not begin like the continuation of
              another clause, minus .4 for each word fewer than 5 and .1 for each word more than 12; at least -1.
  repetition  -.75 for each repetition, at least -3. Repeated content words and repeated word pairs are counted
              separately, and the larger count is used. The topic is a content word.
  copying     -1 for each run of three words that stands in the prompt too, at least -3: an echo is no answer.
  fluency     about 1 for text like the held-out text, .5 if it has one odd word, 0 for shuffled words, and -1.5 for a
              sequence of rare words; see fluency.py.

  Args:
    prompts: one prompt for all responses, or a prompt for each response.
    responses: answers as text; an answer may be empty.
  Raises:
    UserError: the numbers of prompts and responses differ, or a prompt is not one of the task's.
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
    topic = topic_of(prompt)
    named = _names(topic, tokens)
    components[i, :-1] = (
      named,
      _tone(words) if named else min(0.0, _tone(words)),
      _form(tokens, words),
      _repetition(words, topic),
      _copying(words, prompt),
    )
  components[:, -1] = np.clip(fluent, _FLUENT_FLOOR, 1.0)
  return components


def gold_score(prompts: str | Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """The true preference for each response. Arguments and errors as in `gold_components`.

  Good answers score 3 to 4.5, lines of the text about another topic about 2, and the empty answer -2.5.
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


def _repetition(words: list[str], topic: str) -> float:
  common = _common_words() - {topic}
  content = [word for word in words if word not in common]
  pairs = list(itertools.pairwise(words))
  # The larger of the two counts. "the king ... the king" repeats one thing, not both a word and a word pair.
  said_again = max(len(content) - len(set(content)), len(pairs) - len(set(pairs)))
  return -0.75 * min(said_again, 4)


def _copying(words: list[str], prompt: str) -> float:
  # Three words, because any answer on the topic shares two with "... about the king."
  line = prompt.removesuffix("\n").rsplit("\n", 1)[-1]
  asked = set(_triples([token for token in text.tokenize(line) if token not in ".,?"]))
  return -1.0 * min(sum(triple in asked for triple in _triples(words)), 3)


def _triples(words: list[str]) -> list[tuple[str, ...]]:
  return list(zip(words, words[1:], words[2:]))


@functools.lru_cache(maxsize=1)
def _common_words() -> frozenset[str]:
  return frozenset(text.corpus().vocabulary[:_COMMON_WORDS])


# --- Demonstrations ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _lines(split: str) -> tuple[list[str], dict[str, list[str]]]:
  """The clauses that can serve as an answer: all of them, and those that name each topic.

  Such a clause is short, can stand alone and is not a question.
  """
  lines, by_topic = [], collections.defaultdict(list)
  for clause in text.clauses(split):
    tokens = text.tokenize(clause)
    size = sum(token not in ".,?" for token in tokens)
    if tokens[0] in _LEANING_WORDS or tokens[-1] == "?" or not _MIN_LINE <= size <= _MAX_LINE:
      continue
    lines.append(clause)
    # Topics are visited in the order of TOPICS. The order of a set of strings differs between processes, so the
    # demonstrations drawn below would differ too.
    for topic in (topic for topic in TOPICS if topic in tokens):
      by_topic[topic].append(clause)
  return lines, by_topic


def demonstrations(split: str, seed: int) -> list[Demonstration]:
  """Several answers for each prompt, each by a randomly chosen demonstrator. About half of them name the topic.

  Training answers come from training chapters, those of the other splits from held-out chapters.

  Args:
    split: 'train', 'validation' or 'test'.
    seed: any non-negative integer.
  Raises:
    ValueError: there is no such split.
    UserError: the package with the text is not installed.
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
  """Takes the kindest of a few lines that name any topic, and replaces that topic by the one asked for.

  There are only a few lines about each topic. If those were the answers, a small model would memorise them instead of
  learning that the answer's topic comes from the prompt.
  """
  seen = [on_topics[i] for i in rng.integers(len(on_topics), size=tries)]
  named, line = max(seen, key=lambda item: _tone(text.tokenize(item[1])))
  return re.sub(rf"\b{named}\b", topic, line)


def _kindest(pool: list[str], tries: int, rng: np.random.Generator) -> str:
  seen = [pool[i] for i in rng.integers(len(pool), size=tries)]
  return max(seen, key=lambda line: _tone(text.tokenize(line)))


# --- Worked examples for a base model ------------------------------------------------------------


def few_shot_prompt(prompt: str, seed: int = 0, num_examples: int = 3) -> str:
  """Puts worked examples before the prompt. Every prompt and every answer is one line.

  The examples are kind, on topic, and about other topics than the prompt's. A base model continues after its answer, so
  callers should cut its output at the first newline.

  Args:
    prompt: one of the task's prompts.
    seed: chooses the examples.
    num_examples: number of examples; must be less than the number of topics.
  Raises:
    UserError: the prompt is not one of the task's.
  """
  _, by_topic = _lines("train")
  rng = keyed_rng(seed, "few_shot", prompt)
  others = [topic for topic in TOPICS if topic != topic_of(prompt)]
  examples = ""
  for topic in rng.choice(others, size=num_examples, replace=False).tolist():
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    examples += f"{template.format(topic)}{_kindest(by_topic[topic], 8, rng)}\n"
  return examples + prompt
