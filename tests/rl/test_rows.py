"""Padded and shared rows: the same shapes for the caller's functions, and the same answers."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.rl import rows, shared_rows
from instructjax.rl import step as ppo_step
from instructjax.rl.experience import from_rollout
from tests.rl import episodes
from tests.rl.episodes import LENGTH, MASK_BR, PROMPT, ROWS, VOCAB

KINDS = {"padded": rows.padded(), "in parts": rows.padded(3, 2)} | {
  f"shared by {n}": rows.shared(n, VOCAB) for n in (1, 2, 3)
}


@pytest.fixture(scope="module", autouse=True)
def _rows_of_two_widths():
  """Shared rows of 8 columns and of 4, as long episodes and short ones want."""
  with mock.patch.multiple(shared_rows, NARROWEST=4, NARROWING=2, JOINED=0):
    yield


@pytest.fixture(scope="module")
def scored(quick_jit, nets, weights, ppo_config):
  """(kind, whose log-probs) -> the Scored of one rollout: one program."""
  cfg = dataclasses.replace(ppo_config, whiten_advantages=False)
  cases = [
    ("padded", "rollout"),
    ("padded", "rescore"),
    ("shared by 2", "rollout"),
    ("shared by 1", "rescore"),
    ("in parts", "rescore"),
  ]

  def everything(params, value_params, frozen, rollout):
    state = ppo_step.create_state(params, value_params, nets, cfg, jax.random.key(0))
    return {
      (kind, whose): from_rollout(
        nets,
        dataclasses.replace(cfg, behaviour_logprob=whose),
        KINDS[kind],
        state,
        frozen,
        rollout,
      )
      for kind, whose in cases
    }

  return jax.tree.map(np.asarray, quick_jit(everything)(*weights, episodes.make_rollout()))


def assert_trees_close(got, expected):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


@pytest.mark.parametrize(
  "kind, whose", [("shared by 2", "rollout"), ("shared by 1", "rescore"), ("in parts", "rescore")]
)
def test_shared_rows_are_scored_as_padded_ones(scored, kind, whose):
  without_waste = lambda scored: dataclasses.replace(
    scored, metrics={n: x for n, x in scored.metrics.items() if n != "score_waste"}
  )
  got, want = without_waste(scored[kind, whose]), without_waste(scored["padded", whose])
  assert_trees_close(got, want)


def test_the_share_of_scored_cells_without_a_token(scored):
  is_token_BL = episodes.tokens_and_mask()[1]
  assert sorted(is_token_BL.sum(axis=1)) == [3, 3, 4, 5, 6, 8]
  waste = {case: result.metrics["score_waste"] for case, result in scored.items()}
  padded, shared = waste["padded", "rollout"], waste["shared by 1", "rescore"]
  np.testing.assert_allclose(padded, 1 - 29 / (ROWS * LENGTH), rtol=1e-6)
  # Rows of 8 with 8, with 6, with 5 and 3, then two of 4, which are a chunk, with 4 and with 3.
  np.testing.assert_allclose(shared, 1 - 29 / (4 * LENGTH), rtol=1e-6)


@pytest.fixture(scope="module")
def gradients(quick_jit, nets, weights, ppo_config):
  """kind -> what `gradient` returns for the policy's loss and for the value network's: one program."""
  batch = episodes.make_experience()

  def everything(params, value_params):
    losses = (
      (
        functools.partial(ppo_step.policy_loss, nets, ppo_config, weights[2]),
        params,
        batch,
        "is_actor_BR",
      ),
      (
        functools.partial(ppo_step.value_loss, nets, ppo_config, weights[2]),
        value_params,
        batch,
        "is_response_BR",
      ),
    )
    return {
      name: [dataclasses.astuple(kind.gradient(*arguments)) for arguments in losses]
      for name, kind in KINDS.items()
    }

  return jax.tree.map(np.asarray, quick_jit(everything)(*weights[:2]))


# 29 tokens: in three rows of 8 and two of 4, of which two or six fill a chunk.
@pytest.mark.parametrize(
  "kind, cells",
  [("shared by 1", 4 * LENGTH), ("shared by 3", 6 * LENGTH), ("in parts", ROWS * LENGTH)],
)
@pytest.mark.parametrize("whose", ["policy", "value"])
def test_shared_rows_train_as_padded_ones(gradients, whose, kind, cells):
  which = ("policy", "value").index(whose)
  loss, metrics, grads, waste = gradients["padded"][which]
  got_loss, got_metrics, got_grads, got_waste = gradients[kind][which]
  np.testing.assert_allclose(
    [waste, got_waste], [1 - 29 / (ROWS * LENGTH), 1 - 29 / cells], rtol=1e-6
  )
  np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
  episodes.assert_same_gradient(got_grads, grads)
  assert metrics["clip_fraction"] > 0
  compared = metrics.keys() - {"explained_variance"}  # no mean over tokens, and not logged
  for metric in compared:
    np.testing.assert_allclose(got_metrics[metric], metrics[metric], rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_comes_back_in_the_rollouts_columns(kind):
  """Each column's token, and each response's token, read from rows of either kind."""
  seen = []

  def read(token_BL, segment_BL, prompt_length):
    seen.append((token_BL.shape, prompt_length))
    # Where a column belongs to no episode there is no token, whatever the row.
    token_BL = jnp.where(segment_BL > 0, token_BL, -1)
    return {"token_BL": token_BL + 1, "token_BR": token_BL[:, prompt_length:] + 1}

  rollout = jax.tree.map(jnp.asarray, episodes.make_rollout())
  arrays, _ = KINDS[kind].score(read, rollout)
  token_BL, is_token_BL = episodes.tokens_and_mask()
  np.testing.assert_array_equal(arrays["token_BL"], np.where(is_token_BL, token_BL + 1, 0))
  response_BR = np.where(MASK_BR, token_BL[:, PROMPT:] + 1, 0)
  np.testing.assert_array_equal(arrays["token_BR"], response_BR)
  if kind == "padded":
    assert seen == [((ROWS, LENGTH), PROMPT)]
  elif kind == "in parts":
    assert {*seen} == {((ROWS // 3, LENGTH), PROMPT)}
  else:
    num_rows = int(kind.split()[-1])
    assert {*seen} == {((num_rows, 8), 1), ((2 * num_rows, 4), 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_sees_only_the_last_columns_of_its_rows(kind):
  """By hand: the mean return over the actor's tokens, whose gradient is the mean."""
  batch = jax.tree.map(jnp.asarray, episodes.make_experience())

  def loss(scale, batch):
    assert batch.return_BR.shape[1] == batch.token_BL.shape[1] - batch.prompt_length
    assert batch.prompt_length == (1 if kind.startswith("shared") else PROMPT)
    sum_ = jnp.sum(jnp.where(batch.is_actor_BR, scale * batch.return_BR, 0))
    mean = sum_ / jnp.maximum(jnp.sum(batch.is_actor_BR), 1)
    return mean, {"same": mean}

  got = KINDS[kind].gradient(loss, jnp.float32(2), batch, "is_actor_BR")
  mean = batch.return_BR[batch.is_actor_BR].mean()
  np.testing.assert_allclose([got.loss, got.metrics["same"]], 2 * mean, rtol=1e-5)
  np.testing.assert_allclose(got.grads, mean, rtol=1e-5)


def test_the_choice_between_the_two_kinds(ppo_config):
  chosen = ppo_step.make_rows(dataclasses.replace(ppo_config, packed_rows=2), VOCAB)
  rollout = jax.tree.map(jnp.asarray, episodes.make_rollout())
  read = lambda token_BL, segment_BL, prompt_length: {"token_BL": token_BL}
  np.testing.assert_allclose(chosen.score(read, rollout)[1], 1 - 29 / (4 * LENGTH), rtol=1e-6)
  parts = ppo_step.make_rows(
    dataclasses.replace(ppo_config, microbatches=2, score_microbatches=3), VOCAB
  )
  assert (parts.score.args, parts.gradient.args) == ((3,), (2,))
