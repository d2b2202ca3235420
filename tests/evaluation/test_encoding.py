"""Contexts, continuations and windows, as lm-evaluation-harness makes them."""

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import encoding
from tests.evaluation import small_models


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  return small_models.tokenizer(tmp_path_factory.mktemp("words"))


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(words):
  for context, continuation in (("the cat ", "sat"), ("the cat", " sat"), ("the cat  ", "sat on")):
    before, after = encoding.pair_ids(words, context, continuation, 7)
    assert before == words.encode("the cat")
    assert before + after == words.encode(context + continuation)
    assert words.decode(after).strip() == continuation.strip()


def test_without_a_context_the_first_token_stands_before(words):
  assert encoding.pair_ids(words, "", "the sea", 7) == ([7], words.encode("the sea"))
  ids = words.encode("the sea")
  assert encoding.pair_ids(words, "", "the sea", ids[0]) == (ids[:1], ids[1:])
  before, after = encoding.pair_ids(words, "  ", "the sea", 7)
  assert (before, after) == ([7], words.encode("  the sea"))


def test_a_continuation_must_add_something(words):
  with pytest.raises(UserError, match="one is empty"):
    encoding.pair_ids(words, "the cat", "", 7)


def test_windows_predict_every_token_once():
  """Ten tokens in windows of four, as get_rolling_token_windows and make_disjoint_window give them."""
  ids = list(range(10, 20))
  assert encoding.windows(ids, 7, 4) == [
    ([7], [10, 11, 12, 13]),
    ([13], [14, 15, 16, 17]),
    ([15, 16, 17], [18, 19]),
  ]
  assert encoding.windows(ids, 7, 10) == [([7], ids)]


def test_the_first_token_is_bos_or_else_eos(words):
  assert words.bos_id is None
  assert encoding.prefix_id(words) == words.eos_id
