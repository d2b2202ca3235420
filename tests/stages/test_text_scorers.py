"""Reward models that read text: what they read, that their scores are their own, and what is refused."""

import dataclasses
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.rl import scoring
from instructjax.stages import reward_functions, text_scorers
from instructjax.stages.reward_functions import Episodes
from tests import micro, tiny

VOCAB = 23
CFG = micro.config("ppo", {}, ppo__rewards=("rm", "0.5*model:runs/b:c/rm")).ppo
# A letter is its place in the alphabet, and a prompt begins with 21.
TOKENIZER = types.SimpleNamespace(
  pad_id=VOCAB,
  eos_id=22,
  bos_id=21,
  encode=lambda text: [ord(letter) - 97 for letter in text],
  decode=lambda ids: "".join(chr(97 + i) for i in ids),
)


def test_texts_are_encoded_as_a_demonstration_is_and_lose_their_beginning():
  encode = lambda *row, length=9: text_scorers.encode(TOKENIZER, *row, length)
  assert encode("ab", "cd", True) == [21, 0, 1, 2, 3, 22]
  assert encode("ab", "cd", False) == [21, 0, 1, 2, 3]
  assert encode("ab", "", True) == [21, 0, 1, 22]
  assert encode("ab", "cd", True, length=3) == [2, 3, 22]


def opened(**changes):
  given = dict(head="scalar", item="params", require_rows=lambda: None)
  locate = lambda path: types.SimpleNamespace(path=path, **given | changes)
  with mock.patch.object(text_scorers.weights, "locate", locate):
    return text_scorers.open_all(CFG)


def test_those_of_the_list_are_found_and_language_models_refused():
  (found,) = opened()
  assert found.given.path == "runs/b:c/rm" and found.reward.weight == 0.5
  for changes in (dict(head="lm"), dict(item="value_params")):
    with pytest.raises(UserError) as error:
      opened(**changes)
    assert str(error.value).startswith("ppo.rewards: model:runs/b:c/rm must be a reward model")
  with pytest.raises(UserError) as error:
    text_scorers.open_all(dataclasses.replace(CFG, rewards=("model:/no/such/folder",)))
  assert str(error.value).startswith("ppo.rewards: model:/no/such/folder: /no/such/folder must be")


@pytest.mark.parametrize("demonstrations", ["jsonl:d", ""])
def test_scores_are_the_networks_own_with_demonstrations_at_0(
  random_params, quick_jit, monkeypatch, capsys, demonstrations
):
  model = tiny.make_model(tiny.NETWORK, VOCAB, "scalar")
  params = random_params(model, 1)
  (found,) = opened(
    model=lambda mesh: model,
    load=lambda mesh, model: params,
    tokenizer=TOKENIZER,
    network=tiny.NETWORK,
    score_skips=None,
  )
  # In the run's tokenizer a letter is one more, and 0 ends an answer.
  theirs = types.SimpleNamespace(decode=lambda ids: "".join(chr(96 + i) for i in ids))
  pairs = [([1, 2], [3, 0]), ([4], [0]), ([2], [5, 5, 0])]
  ctx = types.SimpleNamespace(
    mesh=text_scorers.sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]),
    tokenizer=theirs,
    data=types.SimpleNamespace(demonstration_tokens={"train": pairs}.__getitem__),
    config=micro.config(
      "ppo",
      {},
      data__demonstrations=demonstrations,
      data__max_prompt_length=3,
      data__max_response_length=3,
      ppo__batch_size=4,
      ppo__score_microbatches=2,
    ),
  )
  monkeypatch.setattr(jax, "jit", quick_jit)
  sizes, place = set(), text_scorers.sharding.place_rows
  placed = lambda mesh, rows: sizes.update(len(x) for x in rows) or place(mesh, rows)
  monkeypatch.setattr(text_scorers.sharding, "place_rows", placed)
  function = text_scorers.load(ctx, "ppo", found, ctx.config.ppo)
  assert function.everywhere and "in rows of 12 of its own tokens" in capsys.readouterr().out
  episodes = Episodes(["ab", "c"], ["cdd", ""], [False, True], [], [], 1)
  got = reward_functions.call(function, episodes)
  assert sizes == {2}  # answers at a time

  def score(*ids):
    row = jnp.array([ids], jnp.int32)
    return float(scoring.sequence_score(model, params, row, row < VOCAB)[0])

  expected = np.array([score(21, 0, 1, 2, 3, 3), score(21, 2, 22)])
  if demonstrations:  # ab c, d, b ee
    zero = [score(21, 0, 1, 2, 22), score(21, 3, 22), score(21, 1, 4, 4, 22)]
    expected -= np.mean(zero)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
