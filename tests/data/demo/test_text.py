"""The default text: cutting, cleaning, filtering, splits, and the error when it is missing."""

import re

import pytest

from instructjax.data.demo import text

RAW = (
  '1. God said, "Let there be light," and there was light. 2.`Bring the -[fruits] (all of them) '
  "to me. Selah.       Psalm 4  For the Chief Musician. A Psalm by David.1. Answer me when I call "
  "you, God of my father`s house. BOOK II       Psalm 51. You won`t forget the kings` sons, ok?"
)


def test_split_chapters_strips_numbers_headings_brackets_and_quotes():
  chapters = text.split_chapters(RAW)
  assert len(chapters) == 3
  assert text.split_clauses(chapters[0]) == ["god said, let there be light, and there was light."]
  assert "bring the fruits ;all of them; to me" in re.sub(r"\s+", " ", chapters[0])
  assert text.split_clauses(chapters[1]) == ["answer me when i call you, god of my father's house."]
  assert text.split_clauses(chapters[2]) == ["you won't forget the kings sons, ok?"]


def test_split_clauses_cuts_long_sentences_at_commas_and_drops_the_rest():
  chapter = (
    "a b c d e f, g h i j k l, m n o p q r? too short; "
    "a b c d e f g h i j k l m n o p q is seventeen and more."
  )
  # 6 + 6 words fit the twelve, the third segment is a clause of its own and keeps the mark.
  assert text.split_clauses(chapter) == ["a b c d e f, g h i j k l.", "m n o p q r?"]


def test_tokenize_keeps_apostrophes_and_marks():
  assert text.tokenize("The king's house, isn't it?") == [
    "the",
    "king's",
    "house",
    ",",
    "isn't",
    "it",
    "?",
  ]


def test_unknown_split_is_refused(bible):
  with pytest.raises(ValueError, match="split='test' of the text") as raised:
    text.documents("test")
  assert type(raised.value) is ValueError  # a programmer's mistake


def test_text_is_clean_and_of_common_words(bible):
  known = set(bible.vocabulary)
  assert len(bible.vocabulary) == text.VOCABULARY_SIZE
  for clause in text.clauses("train") + text.clauses("validation"):
    assert re.fullmatch(r"[a-z', -]+[.?]", clause), clause
    words = [token for token in text.tokenize(clause) if token not in ".,?"]
    assert text.MIN_WORDS <= len(words) <= text.MAX_WORDS, clause
    assert known.issuperset(words), clause


def test_chapters_are_all_found_and_split_without_overlap(bible):
  # 1189 chapters; a few have no clause of common words alone.
  assert len(text.split_chapters(text.read_text())) == 1189
  train, validation = text.documents("train"), text.documents("validation")
  assert 1180 <= len(train) + len(validation) <= 1189
  assert 0.06 < len(validation) / (len(train) + len(validation)) < 0.10
  assert not set(train) & set(validation)
  assert len(text.clauses("train")) > 35_000


def test_documents_keep_text_order(bible):
  chapter = " ".join(text.split_chapters(text.read_text())[0].split())
  lines = text.documents("train")[0].split("\n")
  assert lines[0] == "in the beginning god created the heavens and the earth."
  at = 0
  for line in lines:
    at = chapter.index(line.rstrip(".?"), at)
