"""One answer: what is drawn, what is shown and when, and its score.

Compared with `sampling.generate` and `scoring`, which have tests of their own. Weights are random:
nothing is trained here.
"""

import copy
import dataclasses
import functools
import gc
import weakref

import jax
import numpy as np
import pytest

from instructjax.core.structs import PromptBatch
from instructjax.rl import sampling, scoring
from instructjax.serve import speaker
from tests.serve.speaking import DRAW, GREEDY, MEAN, PROMPT, answer


@pytest.mark.parametrize("draw", [DRAW, GREEDY], ids=["sampled", "greedy"])
def test_answers_are_those_of_generate(quick_jit, run, sft, draw):
  model, params = run[1]["sft"]
  ids, eos_id = sft.tokenizer.encode_prompt(PROMPT), sft.tokenizer.eos_id
  options = dict(max_new_tokens=24, stop_ids=(eos_id,), temperature=draw.temperature)
  generate = quick_jit(functools.partial(sampling.generate, model, **options))
  prompts = PromptBatch(np.int32([ids]), np.ones((1, len(ids)), bool), np.int32([0]))
  endings = set()
  for seed in range(12 if draw is DRAW else 1):
    rollout = generate(params, prompts, jax.random.key(seed))
    tokens = np.asarray(rollout.token_BL)[0, len(ids) :][np.asarray(rollout.is_response_BR)[0]]
    given, pieces = answer(sft, key=jax.random.key(seed), draw=draw)
    assert given.text == sft.tokenizer.decode(tokens)
    assert (given.num_prompt_tokens, given.num_tokens) == (len(ids), len(tokens))
    assert given.ended == (tokens[-1] == eos_id)
    assert len(pieces) > len(tokens) // 2  # it comes token by token
    endings.add(given.ended)
  assert endings == {False, True} or draw is GREEDY  # both happened


def test_an_answer_ends_at_any_stop_token_which_is_not_shown(sft):
  whole, _ = answer(sft, draw=GREEDY)
  word = sft.tokenizer.encode(whole.text)[3]
  tokenizer = copy.copy(sft.tokenizer)
  tokenizer.stop_ids = (tokenizer.eos_id, word)
  given, _ = answer(dataclasses.replace(sft, tokenizer=tokenizer), draw=GREEDY)
  assert given.ended and given.num_tokens < whole.num_tokens
  assert whole.text.startswith(given.text)
  assert word not in tokenizer.encode(given.text)


def test_the_key_decides_and_top_p_narrows(sft):
  texts = [answer(sft, key=jax.random.key(seed))[0].text for seed in (5, 5, 6)]
  assert texts[0] == texts[1] != texts[2]
  narrow = dataclasses.replace(DRAW, top_p=1e-6)  # a nucleus of one token
  assert answer(sft, draw=narrow)[0].text == answer(sft, draw=GREEDY)[0].text != texts[0]


def test_prompts_of_many_lengths_share_programs(sft):
  before = len(sft._programs)
  draw = dataclasses.replace(GREEDY, max_new_tokens=3)
  for prompt in ("a", "say", PROMPT):
    answer(sft, prompt, draw=draw)
  assert len(sft._programs) == before + 1


def test_nothing_keeps_a_speaker_that_is_no_longer_used(sft):
  own = dataclasses.replace(sft)
  answer(own, draw=dataclasses.replace(GREEDY, max_new_tokens=2))
  gone = weakref.ref(own)
  del own
  gc.collect()
  assert gone() is None


def test_an_answer_ends_where_the_context_does(sft):
  limit = sft.model.network.max_length
  encode = lambda count: "\n" * count
  given, _ = answer(sft, encode(limit - 2))
  assert given.num_tokens <= 2
  # More tokens than there is room for cost nothing: the cache is no longer than the context.
  whole = lambda times: dataclasses.replace(DRAW, max_new_tokens=times * limit)
  answer(sft, "a", draw=whole(1))
  before = len(sft._programs)
  answer(sft, "a", draw=whole(2))
  assert len(sft._programs) == before
  with pytest.raises(ValueError, match=f"prompt of {limit} tokens must be shorter than"):
    answer(sft, encode(limit))
  with pytest.raises(ValueError, match="must hold at least one token"):
    answer(sft, "")


class Bytes:
  """A tokenizer of bytes; id 256 is EOS."""

  def decode(self, ids):
    return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize(
  ("text", "pieces"),
  [
    ("aé\n日🙂b".encode(), {0: "a", 2: "é", 3: "\n", 6: "日", 10: "🙂", 11: "b"}),
    # Nothing is broken here, but only the next byte tells.
    ("é\ufffd!".encode(), {1: "é", 5: "\ufffd!"}),
    ("a日".encode()[:-1], {0: "a", 3: "\ufffd"}),  # EOS in the middle of a character
  ],
)
def test_text_comes_as_soon_as_a_character_is_whole(text, pieces):
  fed = []

  def feed():
    for token in [*text, 256]:
      fed.append(token)
      yield token

  shown = {len(fed) - 1: piece for piece in speaker.text_pieces(Bytes(), feed())}
  assert shown == pieces


@pytest.mark.parametrize("ended", [False, True])
def test_score_is_that_of_scoring_with_the_bias(quick_jit, run, seat, ended):
  judge = seat("sft", reward="rm").judge
  model, params = run[1]["rm"]
  text = "the sea is near the hill."
  ids = judge.tokenizer.encode(PROMPT) + judge.tokenizer.encode(text)
  token_BL = np.int32([ids + [judge.tokenizer.eos_id] * ended])
  score = quick_jit(functools.partial(scoring.sequence_score, model))
  expected = score(params, token_BL, token_BL >= 0)[0] - MEAN
  given = speaker.Answer(text, 1, 1, ended, 1.0, 1.0)
  np.testing.assert_allclose(speaker.score(judge, PROMPT, given), expected, atol=1e-5)
  with pytest.raises(ValueError, match="tokens must not exceed the context of 100"):
    speaker.score(judge, PROMPT, dataclasses.replace(given, text="sea " * 300))
