"""Log-probabilities, answers and rewards, beside a forward pass over each text by itself."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from instructjax import models
from instructjax.core.errors import UserError
from instructjax.evaluation import encoding, generation, language_model
from instructjax.evaluation.language_model import Request
from tests import quick
from tests.evaluation import small_models

PAIRS = [
  ("the cat sat on", " the mat"),
  ("the cat sat on", " the sea and looked at a hill"),
  ("the cat sat on", " a hill"),
  ("", "who sat on the hill?"),
  ("a hill by the sea is ", "sand"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def small(folder):
  return small_models.language_model(folder)


@functools.partial(jax.jit, static_argnames="model", compiler_options=quick.OPTIONS)
def forward(model, params, row, segment, position):
  return models.apply(model, params, row, segment_BL=segment, position_BL=position)


def logits_of(one, ids):
  """Logits of one text in a row of its own, in float64 from here on."""
  column = np.arange(64, dtype=np.int32)[None]
  row = np.full_like(column, one.model.vocab_size)
  row[0, : len(ids)] = ids
  with jax.set_mesh(one.mesh):
    out = forward(one.model, one.params, row, np.int32(column < len(ids)), column)
  return np.asarray(out[0], np.float64)[: len(ids)]


def straight(one, before, after):
  """(log-probabilities, whether all are the likeliest) of `after`."""
  logits = logits_of(one, (before + after)[:-1])[len(before) - 1 :]
  logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logprob[np.arange(len(after)), after], bool((logits.argmax(-1) == after).all())


def test_log_probs_are_those_of_a_straight_pass(small):
  told = {}
  results = language_model.log_probs(small, PAIRS, told.__setitem__)
  assert told == dict(enumerate(results))
  for pair, result in zip(PAIRS, results):
    before, after = encoding.pair_ids(small.tokenizer, *pair, small.first_id)
    expected, greedy = straight(small, before, after)
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-5)
    assert result.log_prob == pytest.approx(expected.sum(), abs=1e-4)
    assert result.is_greedy == greedy
    assert len(result.tokens) == len(after)


def test_what_is_no_number_is_refused(small):
  broken = dataclasses.replace(small, params=jax.tree.map(lambda x: x * np.nan, small.params))
  with pytest.raises(UserError, match="is not a number: the model's weights may be damaged"):
    language_model.log_probs(broken, PAIRS[:1])


def test_a_long_context_loses_its_beginning(small):
  context = " ".join(small_models.TEXTS) * 2
  (result,) = language_model.log_probs(small, [(context, " the sea")])
  before, after = encoding.pair_ids(small.tokenizer, context, " the sea", small.first_id)
  assert len(before) > small.max_length
  assert result.is_cut
  kept = (before + after)[-(small.max_length + 1) :]
  expected, _ = straight(small, kept[: -len(after)], after)
  np.testing.assert_allclose(result.log_probs, expected, atol=2e-5)
  with pytest.raises(UserError, match="must not exceed"):
    language_model.log_probs(small, [("a", context)])


def test_rolling_sums_windows(small):
  texts = [" ".join(small_models.TEXTS), "the sea"]
  results = language_model.rolling(small, texts)
  for text, result in zip(texts, results):
    ids = small.tokenizer.encode(text)
    parts = encoding.windows(ids, small.first_id, small.max_length)
    expected = np.concatenate([straight(small, *part)[0] for part in parts])
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-5)
    assert len(result.log_probs) == len(ids)
  assert len(encoding.windows(small.tokenizer.encode(texts[0]), 1, small.max_length)) > 1


def greedy(one, prompt, count):
  ids = list(one.tokenizer.encode(prompt))
  found = []
  for _ in range(count):
    found.append(int(logits_of(one, ids + found)[-1].argmax()))
    if found[-1] in one.tokenizer.stop_ids:
      return found[:-1]
  return found


def test_numbers_that_there_are_not_are_refused():
  with pytest.raises(UserError, match="dtype=float16 must be one of auto, float32, bfloat16"):
    language_model.open_model("nowhere", small_models.one_device(), dtype="float16")


def test_greedy_answers_take_the_likeliest_token(small):
  prompts = ["the cat", "a hill by the sea"]
  requests = [Request(prompt, (), 8) for prompt in prompts]
  for prompt, answer in zip(prompts, language_model.generate(small, requests)):
    assert answer == small.tokenizer.decode(greedy(small, prompt, 8))


def test_an_answer_ends_before_a_stop_text(small):
  (whole,) = language_model.generate(small, [Request("the cat", (), 8)])
  stop = whole[3:5]
  assert language_model.generate(small, [Request("the cat", (stop, "@"), 8)]) == [
    whole[: whole.find(stop)]
  ]
  assert generation.cut("ab\n\ncd", ("\n\n", "c", "")) == "ab"
  assert generation.cut("ab", ("\n",)) == "ab"


def test_a_sampled_answer_depends_on_its_own_request_alone(small):
  requests = [Request("the cat", (), 8, 1.0, seed) for seed in range(4)]
  together = language_model.generate(small, requests)
  assert len(set(together)) > 1
  assert language_model.generate(small, requests[2:3]) == together[2:3]


def test_rewards_are_read_at_the_end_of_text(folder):
  judge = small_models.language_model(folder, head="scalar")
  pairs = [("the cat", " sat"), ("the cat", " looked at the sea")]
  words = judge.tokenizer
  for (prompt, answer), reward in zip(pairs, language_model.rewards(judge, pairs)):
    ids = [*words.encode(prompt), *words.encode(answer), words.eos_id]
    assert reward == pytest.approx(logits_of(judge, ids)[-1], abs=2e-5)
