"""Answers on the host: where their tokens lie, and what their text is. Sampling is in tests/stages/test_pipeline.py."""

import types

import jax
import numpy as np
import pytest

from instructjax import models
from instructjax.parallel import sharding
from instructjax.stages import answers
from tests import tiny

EOS, STOP, PAD = 1, 2, 40
LIMITS = types.SimpleNamespace(max_prompt_length=3, max_response_length=4)


class LetterTokenizer:
  """One token a letter, from 10 on."""

  eos_id, pad_id, bos_id = EOS, PAD, None
  stop_ids = (EOS, STOP)

  def encode(self, text):
    return [10 + ord(letter) - ord("a") for letter in text]

  def decode(self, ids):
    return "".join(" " if i == 9 else "$" if i == EOS else chr(ord("a") + i - 10) for i in ids)


def test_tokens_without_a_score_are_counted_from_the_end():
  count = lambda *ids, skips=0: answers.num_skipped(ids, skips)
  assert [count(3, 1, 0), count(3, 0, 0), count(0, 3, 4), count(3, 0, 4)] == [1, 2, 0, 0]
  assert count(0, 0) == 1  # the score of something is always read
  assert count(3, 0, skips=None) == 0


CONTEXT = types.SimpleNamespace(
  config=types.SimpleNamespace(data=LIMITS), tokenizer=LetterTokenizer()
)


def test_prompts_end_at_the_same_column():
  token_NP, is_prompt_NP = answers.pad_left([[11], [12, 13, 14]], 3, PAD)
  assert token_NP.tolist() == [[PAD, PAD, 11], [12, 13, 14]] and token_NP.dtype == np.int32
  assert is_prompt_NP.tolist() == [[False, False, True], [True, True, True]]


def test_an_answer_follows_its_prompt():
  """Right-padded to the 3 + 4 tokens that data allows; the first has an EOS, and so ended."""
  given = answers.from_tokens(CONTEXT, [[10, 11], [12]], [[13, EOS], [14, 15, 16, 17]])
  assert given.token_NL.tolist() == [
    [10, 11, 13, EOS, PAD, PAD, PAD],
    [12, 14, 15, 16, 17, PAD, PAD],
  ]
  assert given.is_token_NL.sum(axis=1).tolist() == [4, 5]
  assert given.is_response_NR.tolist() == [
    [False, False, True, True, False, False, False],
    [False, True, True, True, True, False, False],
  ]
  assert given.ended_N.tolist() == [True, False]
  assert given.text == ["d$", "efgh"]


def test_an_answer_ends_at_any_stop_token():
  given = answers.from_tokens(CONTEXT, [[10]] * 3, [[13, STOP], [13, EOS], [13]])
  assert given.ended_N.tolist() == [True, True, False]
  assert answers.decode(LetterTokenizer(), np.array([[13, STOP, PAD], [13, EOS, PAD]])) == ["d"] * 2


def test_text_is_cut_to_the_limit_and_ends_where_it_was_sampled_to_end():
  given = answers.from_text(CONTEXT, ["ab"] * 3, ["c", "c", "cdef"], np.array([True, False, True]))
  first, second, third = given.token_NL[:, 2:].tolist()
  assert first == [12, EOS, PAD, PAD, PAD]
  assert second == [12, PAD, PAD, PAD, PAD]
  assert third == [12, 13, 14, 15, PAD]  # four tokens are the limit: no room for an EOS
  assert given.ended_N.tolist() == [True, False, False]


def test_eos_pads_and_blanks_around_are_no_text():
  rows = np.array([[9, 10, 9, 11, EOS, PAD], [PAD] * 6])
  assert answers.decode(LetterTokenizer(), rows) == ["a b", ""]


def test_chunks_are_equal_and_what_fills_the_last_is_dropped():
  seen = []

  def one(start, x_N):
    seen.append((start, x_N.tolist()))
    return 10 * x_N

  got = answers._in_chunks(one, 5, np.arange(5), rows=2)
  assert seen == [(0, [0, 1]), (2, [2, 3]), (4, [4, 4])]
  np.testing.assert_array_equal(got, [0, 10, 20, 30, 40])


def test_mean_logprob_counts_the_texts_own_tokens(monkeypatch):
  """No EOS, a text cut at four tokens, and for one without tokens a guess among all."""
  tokenizer = LetterTokenizer()
  tokenizer.vocab_size = 50
  ctx = types.SimpleNamespace(config=CONTEXT.config, tokenizer=tokenizer)
  read = []

  def sequence_logprob(ctx, model, params, sequences, count_N, temperature):
    assert (model, params, temperature) == ("base", "weights", 1.0)
    read.append((sequences, count_N.tolist()))
    return np.array([-6.0, -8.0, 0.0])

  monkeypatch.setattr(answers, "sequence_logprob", sequence_logprob)
  mean = answers.mean_logprob(ctx, "base", "weights", ["ab", "c", "c"], ["def", "ghijk", ""])
  np.testing.assert_allclose(mean, [-2.0, -2.0, -np.log(50)])
  assert read == [([[10, 11, 13, 14, 15], [12, 16, 17, 18, 19], [12]], [3, 4, 0])]


@pytest.mark.parametrize("row_length", [0, 8, 16])
def test_logprob_is_that_of_the_answers_tokens_wherever_they_lie(random_params, row_length):
  """In rows of their own and in shared ones, beside a whole forward pass of each sequence alone."""
  model = tiny.make_model(tiny.GPT2, PAD, "lm")
  params = random_params(model, 1)
  tokenizer = LetterTokenizer()
  tokenizer.vocab_size = PAD
  config = types.SimpleNamespace(data=LIMITS, rm=types.SimpleNamespace(row_length=row_length))
  mesh = sharding.make_mesh(tiny.CONFIG.mesh)
  ctx = types.SimpleNamespace(config=config, tokenizer=tokenizer, mesh=mesh)
  prompts, responses = [[10, 11], [12], [20, 21, 22]], [[13, EOS], [14, 15, 16, 17], []]
  given = answers.from_tokens(ctx, prompts, responses)
  expected = []
  for prompt, response in zip(prompts, responses):
    token_1T = np.array([prompt + response])
    place_1T = np.arange(token_1T.size)[None]
    logits_1TV = models.apply(
      model, params, token_1T, segment_BL=np.ones_like(token_1T), position_BL=place_1T
    )
    logprob_TV = jax.nn.log_softmax(logits_1TV[0] / 0.5)
    ends = range(len(prompt), token_1T.size)
    expected.append(sum(float(logprob_TV[t - 1, token_1T[0, t]]) for t in ends))
  with jax.set_mesh(mesh):
    found = answers.logprob(ctx, model, params, given, 0.5)
  assert found.dtype == np.float32 and found[2] == 0
  np.testing.assert_allclose(found, expected, rtol=1e-5)
