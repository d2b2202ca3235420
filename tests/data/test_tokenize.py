"""From records to token ids: what a row begins and ends with, and what is left out because it is too long."""

import logging
import re

import pytest

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.data.records import Demonstration, Document, Prompt, Ranking
from instructjax.data.token_store import Encoded
from instructjax.data.tokenize import (
  RankingTokens,
  report,
  tokenize_demonstrations,
  tokenize_documents,
  tokenize_prompts,
  tokenize_rankings,
)

EOS = 1


class LetterTokenizer:
  """One token a character, from 2 on; with a BOS, prompts begin with it."""

  eos_id = EOS
  control_pattern = re.compile("z+")

  def __init__(self, bos_id=None):
    self.bos_id = bos_id

  def encode(self, text):
    return [2 + ord(letter) - ord("a") for letter in text]

  def encode_prompt(self, text):
    return [99]


def test_details_9_long_prompts_are_left_out_and_counted(caplog):
  records = [Prompt("abc"), Prompt("abcd", "p.jsonl:7"), Prompt("a"), Prompt("abcde", "p.jsonl:9")]
  with caplog.at_level(logging.WARNING):
    kept = tokenize_prompts(records, LetterTokenizer(), max_prompt_length=3)
  assert kept == [[2, 3, 4], [2]]
  assert (
    "prompts: left out because too long: 2 prompts (first at p.jsonl:7); 2 are kept" in caplog.text
  )


def test_documents_end_in_eos():
  tokenizer = LetterTokenizer()
  tokenizer.bos_id = None
  assert [*tokenize_documents([Document("ab")], tokenizer)] == [Encoded([2, 3, EOS])]
  tokenizer.bos_id = 7
  assert [*tokenize_documents([Document("ab")], tokenizer)] == [Encoded([7, 2, 3, EOS])]


def test_details_11_long_demonstrations_are_left_out_whole():
  records = [Demonstration("ab", "cd"), Demonstration("ab", "cde"), Demonstration("abc", "c")]
  limits = {"max_prompt_length": 2, "max_response_length": 3}
  left_out = {}
  kept = [*tokenize_demonstrations(records, LetterTokenizer(), left_out, **limits)]
  # "cd" and EOS are 3 tokens; "cde" and EOS would be 4.
  assert kept == [Encoded([2, 3, 4, 5, EOS], num_unweighted=2)]
  assert left_out == {"long_prompts": (1, ""), "long_responses": (1, "")}
  told = "demonstrations: every record is too long: 1 prompt and 1 response; raise data.max_prompt_length or"
  with pytest.raises(ValueError, match=told):
    list(tokenize_demonstrations(records[1:], LetterTokenizer(), {}, **limits))


def test_rankings_lose_long_answers_and_those_at_the_limit_have_no_eos(caplog):
  records = [
    Ranking("a", ("b", "bcd", "bcde"), (3, 2, 1), "ann", where="c.jsonl:4"),
    Ranking("a", ("b", "bcde"), (1, 2), where="c.jsonl:5"),
    Ranking("abc", ("b", "c"), (1, 2), where="c.jsonl:6"),
  ]
  limits = {"max_prompt_length": 2, "max_response_length": 3}
  with caplog.at_level(logging.WARNING):
    kept = tokenize_rankings(records, LetterTokenizer(), **limits)
  assert kept == [RankingTokens([2], [[3, EOS], [3, 4, 5]], [3, 2], "ann")]
  said = "comparisons: left out because too long: 1 prompt (c.jsonl:6) and 2 responses (first at c.jsonl:4); 1 are kept"
  assert caplog.messages == [said]


def test_prompts_begin_as_the_tokenizer_says_and_responses_do_not():
  tokenizer, limits = LetterTokenizer(0), {"max_prompt_length": 2, "max_response_length": 3}
  assert tokenize_prompts([Prompt("a")], tokenizer, max_prompt_length=2) == [[0, 2]]
  records = [Demonstration("a", "b")]
  demonstrations = [*tokenize_demonstrations(records, tokenizer, {}, **limits)]
  assert demonstrations == [Encoded([0, 2, 3, EOS], num_unweighted=2)]
  rankings = tokenize_rankings([Ranking("a", ("b", "c"), (1, 2))], tokenizer, **limits)
  assert rankings == [RankingTokens([0, 2], [[3, EOS], [4, EOS]], [1, 2], None)]


def test_only_what_a_template_made_holds_control_tokens(caplog):
  records = [Prompt("ab"), Prompt("azz"), Prompt(Rendered("azz"))]
  with caplog.at_level(logging.WARNING):
    kept = tokenize_prompts(records, LetterTokenizer(), max_prompt_length=3)
  assert kept == [[2, 3], [2, 27, 27], [99]]
  assert "prompts: 1 of 3 prompts spell a control token, as 'zz', and are read as" in caplog.text


def test_nothing_short_enough_is_an_error():
  with pytest.raises(ValueError, match="prompts: every record is too long: 1 prompt; raise"):
    tokenize_prompts([Prompt("abcd")], LetterTokenizer(), max_prompt_length=3)


def test_one_kind_of_length_alone_is_told_and_refused_too(caplog):
  """Long answers under short prompts, and nothing at all where everything fits."""
  limits = {"max_prompt_length": 2, "max_response_length": 3}
  short, long = Demonstration("ab", "cd"), Demonstration("ab", "cde")
  for records in ([short, long], [short]):
    left_out = {}
    kept = [*tokenize_demonstrations(records, LetterTokenizer(), left_out, **limits)]
    with caplog.at_level(logging.WARNING):
      report("demonstrations", len(kept), left_out)
  assert caplog.messages == ["demonstrations: left out because too long: 1 response; 1 are kept"]
  with pytest.raises(UserError, match="every record is too long: 1 response; raise"):
    list(tokenize_demonstrations([long], LetterTokenizer(), {}, **limits))
