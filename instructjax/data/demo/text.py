"""Public-domain English text for the default preset: clauses of the World English Bible in a small vocabulary.

Called by the other files of `instructjax.data.demo`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re

from instructjax.data.bible import read_text

SPLITS = ("train", "validation")
VOCABULARY_SIZE = 2000  # only clauses made of this many most frequent words are kept
MIN_WORDS, MAX_WORDS = 5, 16
_CUT_WORDS = 12  # a long sentence is cut at a comma before a part would exceed this many words
_VALIDATION_STRIDE, _VALIDATION_OFFSET = 12, 5  # one chapter in twelve is held out

_TOKEN = re.compile(r"[a-z]+(?:['-][a-z]+)*|[.,?]")
_SENTENCE = re.compile(r"([^.;:?!]+)([.;:?!])")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The filtered text. A split is a tuple of chapters, and a chapter a tuple of clauses, in the order of the text."""

  train: tuple[tuple[str, ...], ...]
  validation: tuple[tuple[str, ...], ...]
  vocabulary: tuple[str, ...]  # most frequent word first


def tokenize(text: str) -> list[str]:
  """The lower-cased words of a text and its marks `.`, `,` and `?`. Everything else is skipped."""
  return _TOKEN.findall(text.lower())


def split_chapters(text: str) -> list[str]:
  """Splits the text into chapters, and removes verse numbers, psalm headings and editorial marks.

  A chapter begins at each verse number 1. The source uses ` for apostrophes and inner quotes. It puts words that the
  translators added in square brackets; the words are kept without the brackets.
  """
  # The first psalm runs into its verse number: "BOOK I Psalm 11. Blessed is".
  text = re.sub(r"\s+Psalm \d+?[^\d]*?(?=1\.)", " ", text)
  text = text.replace(" -[", " ").lower()
  text = re.sub(r'["\[\]]', " ", text.replace("`", "'"))
  # Parentheses and dashes end a clause, like semicolons.
  text = re.sub(r"[()]|--", ";", text)
  # Quotes and hyphens are kept only between letters, where they are apostrophes or join words.
  text = re.sub(r"(?<![a-z])['-]|['-](?![a-z])", "", text)
  # Not after a digit: "11." is no beginning of a chapter.
  chapters = re.split(r"(?<!\d)1\.", text)[1:]
  return [re.sub(r"\d+\.?", " ", chapter) for chapter in chapters]


def split_clauses(chapter: str) -> list[str]:
  """Splits a chapter into clauses of MIN_WORDS to MAX_WORDS words, each ending in `.` or `?`, in the order of the text.

  Longer sentences are cut at commas. Pieces that are still too long, or too short, are dropped.
  """
  clauses = []
  for sentence, end in _SENTENCE.findall(chapter):
    end = "?" if end == "?" else "."
    segments = [segment.split() for segment in sentence.split(",") if segment.strip()]
    if sum(map(len, segments)) <= MAX_WORDS:
      groups = [segments]
    else:
      groups = _group_segments(segments)
    for i, group in enumerate(groups):
      if MIN_WORDS <= sum(map(len, group)) <= MAX_WORDS:
        mark = end if i == len(groups) - 1 else "."
        clauses.append(", ".join(" ".join(segment) for segment in group) + mark)
  return clauses


def _group_segments(segments: list[list[str]]) -> list[list[list[str]]]:
  """Joins neighbouring segments between commas into groups of at least MIN_WORDS and about _CUT_WORDS words."""
  groups, group, size = [], [], 0
  for segment in segments:
    if size >= MIN_WORDS and size + len(segment) > _CUT_WORDS:
      groups.append(group)
      group, size = [], 0
    group.append(segment)
    size += len(segment)
  return [*groups, group]


@functools.lru_cache(maxsize=1)
def corpus() -> Corpus:
  """Reads, splits and filters the text. The first call takes about a second; the result is cached.

  Raises:
    UserError: the package with the text is not installed, or its file has another form than expected.
  """
  chapters = [split_clauses(chapter) for chapter in split_chapters(read_text())]
  is_held_out = [i % _VALIDATION_STRIDE == _VALIDATION_OFFSET for i in range(len(chapters))]
  # The vocabulary is counted on training chapters only. Held-out text must not influence what is trained on.
  counts = collections.Counter(
    word
    for clauses, held_out in zip(chapters, is_held_out, strict=True)
    if not held_out
    for word in itertools.chain.from_iterable(map(tokenize, clauses))
    if word.isalpha() or len(word) > 1
  )
  vocabulary = tuple(word for word, _ in counts.most_common(VOCABULARY_SIZE))
  known = {*vocabulary, ".", ",", "?"}
  splits = {False: [], True: []}
  for clauses, held_out in zip(chapters, is_held_out, strict=True):
    kept = tuple(clause for clause in clauses if known.issuperset(tokenize(clause)))
    if kept:
      splits[held_out].append(kept)
  return Corpus(tuple(splits[False]), tuple(splits[True]), vocabulary)


def clauses(split: str) -> list[str]:
  """All clauses of a split in the order of the text.

  Raises:
    ValueError: there is no such split.
    UserError: the text cannot be read.
  """
  return list(itertools.chain.from_iterable(_chapters(split)))


def documents(split: str) -> list[str]:
  """The documents of a split in the order of the text: a document is a chapter, and each of its lines a clause.

  Raises:
    ValueError: there is no such split.
    UserError: the text cannot be read.
  """
  return ["\n".join(chapter) for chapter in _chapters(split)]


def _chapters(split: str) -> tuple[tuple[str, ...], ...]:
  if split not in SPLITS:
    raise ValueError(f"split={split!r} of the text must be one of {list(SPLITS)}")
  return getattr(corpus(), split)
