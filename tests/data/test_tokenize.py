"""From records to token ids: what a row begins and ends with, and what is left out because it is too long."""

import logging

import pytest

from instructjax.data.records import Demonstration, Prompt, Ranking
from instructjax.data.tokenize import (
  DemonstrationTokens,
  RankingTokens,
  tokenize_demonstrations,
  tokenize_prompts,
  tokenize_rankings,
)

EOS = 1


class LetterTokenizer:
  """One token a character, from 2 on; with a BOS, prompts begin with it."""

  eos_id = EOS

  def __init__(self, bos=()):
    self.bos = list(bos)

  def encode(self, text):
    return [2 + ord(letter) - ord("a") for letter in text]

  def encode_prompt(self, text):
    return self.bos + self.encode(text)


def test_details_9_long_prompts_are_left_out_and_counted(caplog):
  records = [Prompt("abc"), Prompt("abcd"), Prompt("a")]
  with caplog.at_level(logging.WARNING):
    kept, counts = tokenize_prompts(records, LetterTokenizer(), max_prompt_length=3)
  assert kept == [[2, 3, 4], [2]]
  assert counts == {"kept": 2, "long_prompts": 1}
  assert "prompts: kept 2; left out for length: long_prompts=1" in caplog.text


def test_details_11_long_demonstrations_are_left_out_whole():
  records = [Demonstration("ab", "cd"), Demonstration("ab", "cde"), Demonstration("abc", "c")]
  kept, counts = tokenize_demonstrations(
    records, LetterTokenizer(), max_prompt_length=2, max_response_length=3
  )
  # "cd" and EOS are 3 tokens; "cde" and EOS would be 4.
  assert kept == [DemonstrationTokens([2, 3], [4, 5])]
  assert counts == {"kept": 1, "long_prompts": 1, "long_responses": 1}


def test_rankings_lose_long_answers_and_those_at_the_limit_have_no_eos():
  records = [
    Ranking("a", ("b", "bcd", "bcde"), (3, 2, 1), "ann"),
    Ranking("a", ("b", "bcde"), (1, 2)),
    Ranking("abc", ("b", "c"), (1, 2)),
  ]
  kept, counts = tokenize_rankings(
    records, LetterTokenizer(), max_prompt_length=2, max_response_length=3
  )
  assert kept == [RankingTokens([2], [[3, EOS], [3, 4, 5]], [3, 2], "ann")]
  assert counts == {"kept": 1, "long_prompts": 1, "long_responses": 2}


def test_prompts_begin_as_the_tokenizer_says_and_responses_do_not():
  tokenizer, limits = LetterTokenizer([0]), {"max_prompt_length": 2, "max_response_length": 3}
  assert tokenize_prompts([Prompt("a")], tokenizer, max_prompt_length=2)[0] == [[0, 2]]
  records = [Demonstration("a", "b")]
  demonstrations, _ = tokenize_demonstrations(records, tokenizer, **limits)
  assert demonstrations == [DemonstrationTokens([0, 2], [3])]
  rankings, _ = tokenize_rankings([Ranking("a", ("b", "c"), (1, 2))], tokenizer, **limits)
  assert rankings == [RankingTokens([0, 2], [[3, EOS], [4, EOS]], [1, 2], None)]


def test_nothing_short_enough_is_an_error():
  with pytest.raises(ValueError, match="prompts: every record is too long .long_prompts=1.; raise"):
    tokenize_prompts([Prompt("abcd")], LetterTokenizer(), max_prompt_length=3)
