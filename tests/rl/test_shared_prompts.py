"""Answers that share their prompt in a row: where they lie, and that nothing else differs from rows of their own."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.models import layers
from instructjax.parallel import sharding
from instructjax.rl import experience, rows, shared_prompts, shared_rows
from instructjax.rl import step as ppo_step
from tests.rl import episodes
from tests.rl.episodes import LENGTH, PROMPT, RESPONSE, ROWS, VOCAB

GROUP = 3
PADDED, SHARED = rows.padded(), rows.shared(3, VOCAB, GROUP)


@pytest.fixture(scope="module", autouse=True)
def not_joined():
  """Rows no wider than a tree needs: 2 + 3 * 6 = 20 of 3 * 8 columns."""
  with mock.patch.object(shared_rows, "JOINED", 0):
    yield


def alike(token_BL):
  """The episodes with the prompt of the first of each three."""
  prompt_BP = np.repeat(token_BL[::GROUP, :PROMPT], GROUP, axis=0)
  return np.concatenate([prompt_BP, token_BL[:, PROMPT:]], axis=1)


def rollout():
  found = episodes.make_rollout()
  token_BL, is_token_BL = alike(found.token_BL), alike(found.is_token_BL)
  assert sorted(set(is_token_BL[:, :PROMPT].sum(axis=1))) != [PROMPT]  # some prompt is padded
  return dataclasses.replace(found, token_BL=token_BL, is_token_BL=is_token_BL)


def batch():
  found = episodes.make_experience()
  return dataclasses.replace(
    found, token_BL=alike(found.token_BL), segment_BL=alike(found.segment_BL)
  )


def test_trees_by_hand():
  """Prompts of 2 and 3 tokens, two answers each, of 1 and 3 and of 2 and 1 tokens; one row of 14 for both."""
  is_token_BL = np.array(
    [
      [0, 1, 1, 1, 0, 0, 0],
      [0, 1, 1, 1, 1, 1, 0],
      [1, 1, 1, 1, 1, 0, 0],
      [1, 1, 1, 1, 0, 0, 0],
    ],
    bool,
  )
  placement, found, width = shared_prompts.place(is_token_BL, prompt_length=3, group=2, rows=2)
  assert width == 14
  # 1 + 2 + 4 columns and 2 + 3 + 2: of equal size, so in their order.
  none = 28
  assert placement.cell_BL.tolist() == [
    [none, 0, 1, 2, none, none, none],
    [none, 0, 3, 4, 5, 6, none],
    [7, 8, 9, 10, 11, none, none],
    [7, 8, 12, 13, none, none, none],
  ]
  assert placement.end_K.tolist() == [1]
  first = lambda x_BL: np.asarray(x_BL).reshape(-1)[:14].tolist()
  assert first(found.segment_BL) == [1] * 7 + [2] * 7
  assert first(found.position_BL) == [0, 1, 2, 1, 2, 3, 4, 0, 1, 2, 3, 4, 2, 3]
  assert first(found.last_BL) == [6, 2, 2, 6, 6, 6, 6, 13, 13, 11, 11, 11, 13, 13]
  assert (np.asarray(found.last_BL).reshape(-1)[14:] == -1).all()
  # The second answer to the second prompt sees that prompt, the copy of its end, and itself.
  mask_SS = layers.tree_mask(np.array([first(found.last_BL)]))[0]
  assert np.flatnonzero(mask_SS[13]).tolist() == [7, 8, 12, 13]


@pytest.mark.parametrize("seed", range(4))
def test_every_token_of_many_trees_has_its_cell(seed):
  """Two tokens share a cell only if they stand at the same place of a common prompt, short of its end."""
  rng = np.random.default_rng(seed)
  prompt_length, length, group, number = 5, 12, 4, 8
  prompt_G = np.repeat(rng.integers(1, prompt_length + 1, number), group)
  response_B = rng.integers(0, length - prompt_length + 1, number * group)
  column = np.arange(length)[None]
  is_token_BL = (column >= (prompt_length - prompt_G)[:, None]) & (
    column < (prompt_length + response_B)[:, None]
  )
  placement, trees, width = shared_prompts.place(
    is_token_BL, prompt_length=prompt_length, group=group, rows=4
  )
  position = np.asarray(trees.position_BL).reshape(-1)
  owner = {}
  for b, t in zip(*np.nonzero(is_token_BL)):
    place = int(t) - (prompt_length - int(prompt_G[b]))
    assert position[int(placement.cell_BL[b, t])] == place
    is_trunk = place < prompt_G[b] - 1
    owner.setdefault(int(placement.cell_BL[b, t]), set()).add(
      (b // group, None if is_trunk else b, place)
    )
  assert all(len(one) == 1 for one in owner.values())
  assert max(owner) < is_token_BL.size
  tree_of_row = {}
  for cell, one in owner.items():
    ((tree, *_),) = one
    tree_of_row.setdefault(tree, set()).add(cell // width)
  assert all(len(found) == 1 for found in tree_of_row.values())  # no tree lies in two rows
  in_use = len({row for found in tree_of_row.values() for row in found})
  assert int(placement.end_K[-1]) * 4 * length >= in_use * width


@pytest.mark.parametrize("whose", ["rollout", "rescore"])
def test_they_are_scored_as_padded_ones(quick_jit, nets, weights, ppo_config, whose):
  cfg = dataclasses.replace(ppo_config, behaviour_logprob=whose)

  def everything(params, value_params, frozen, rollout):
    state = ppo_step.create_state(params, value_params, nets, cfg, jax.random.key(0))
    return [
      experience.from_rollout(nets, cfg, kind, state, frozen, rollout) for kind in (PADDED, SHARED)
    ]

  padded, shared = jax.tree.map(np.asarray, quick_jit(everything)(*weights, rollout()))
  # 27 tokens in 6 rows of 8. Shared, trees of 0 + 6 + 2 + 2 and 2 + 6 + 3 + 2 columns fill one row of 3 * 8.
  waste = [one.metrics.pop("score_waste") for one in (padded, shared)]
  np.testing.assert_allclose(waste, [1 - 27 / 48, 1 - 23 / 24], rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, shared, padded)


@pytest.mark.parametrize("whose", ["policy", "value"])
def test_they_train_as_padded_ones(quick_jit, nets, weights, ppo_config, whose):
  params, value_params, frozen = weights
  loss, over = (
    (ppo_step.policy_loss, "is_actor_BR")
    if whose == "policy"
    else (ppo_step.value_loss, "is_response_BR")
  )
  learned = params if whose == "policy" else value_params

  def everything(params, frozen, batch):
    loss_fn = functools.partial(loss, nets, ppo_config, frozen)
    found = [kind.gradient(loss_fn, params, batch, over) for kind in (PADDED, SHARED)]
    return [dataclasses.astuple(one) for one in found]

  padded, shared = jax.tree.map(np.asarray, quick_jit(everything)(learned, frozen, batch()))
  np.testing.assert_allclose(shared[0], padded[0], rtol=1e-5)
  episodes.assert_same_gradient(shared[2], padded[2])


def test_the_width_of_rows_that_hold_any_tree():
  """A prompt of 3 and answers of 5: 2 + 3 * 6 = 20 columns, of rows of 8."""
  assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, 3) == 3 * LENGTH
  assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, 12) == 3 * LENGTH  # 24 of 12, no wider
  assert shared_prompts.row_width(LENGTH, PROMPT, 1, 2) == LENGTH
  with mock.patch.object(shared_rows, "JOINED", 128):  # preset smollm2: 19 + 4 * 25 columns
    assert shared_prompts.row_width(44, 20, 4, 4) == 176
  assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, 4, shards=2) is None
  # Four rows joined hold one tree of 20, of which there are as many as three rows: the trees would not fit.
  assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, 4) is None
  with mock.patch.object(shared_rows, "JOINED", 30):
    assert (
      shared_prompts.row_width(LENGTH, PROMPT, GROUP, 12) == 6 * LENGTH
    )  # two trees in six rows
    assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, 3) == 3 * LENGTH  # as wide as there are


@pytest.mark.parametrize("joined, rows, width", [(0, 3, 24), (30, 12, 48), (60, 12, 96)])
def test_the_longest_trees_of_all_fit(joined, rows, width):
  is_token_BL = np.ones((36, LENGTH), bool)
  with mock.patch.object(shared_rows, "JOINED", joined):
    assert shared_prompts.row_width(LENGTH, PROMPT, GROUP, rows) == width
    placement, *_ = shared_prompts.place(is_token_BL, prompt_length=PROMPT, group=GROUP, rows=rows)
  cells = np.asarray(placement.cell_BL)
  assert cells.max() < is_token_BL.size
  # Each tree's trunk of two columns is shared by three answers of six columns.
  assert len(np.unique(cells)) == 12 * (2 + 3 * 6)


def test_answers_to_a_prompt_stay_in_one_minibatch(ppo_config):
  """The order of prompts is drawn, and the answers to one follow each other."""
  cfg = dataclasses.replace(
    ppo_config,
    batch_size=ROWS,
    num_minibatches=2,
    num_epochs=8,
    packed_rows=3,
    samples_per_prompt=GROUP,
    share_prompts=True,
  )
  assert ppo_step.make_rows(cfg, VOCAB, True).score.args[2].args == (3, GROUP)
  assert ppo_step.make_rows(cfg, VOCAB, False).score.args[2].args == (3, 1)
  seen = []

  def minibatch(nets, cfg, rows, frozen, state, batch, ptx):
    jax.debug.callback(
      lambda row: seen.append(row.tolist()), batch.advantage_BR[:, 0], ordered=True
    )
    return state, {"ratio_max": batch.advantage_BR[0, 0]}

  number_BR = np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], RESPONSE, axis=1)
  numbered = jax.tree.map(jnp.asarray, dataclasses.replace(batch(), advantage_BR=number_BR))
  with mock.patch.object(ppo_step, "_minibatch_update", minibatch):
    ppo_step.update(None, cfg, None, None, jnp.zeros(()), numbered, None, jax.random.key(0))
    jax.effects_barrier()
  assert len(seen) == 16 and all(one in ([0, 1, 2], [3, 4, 5]) for one in seen)
  assert len({tuple(one) for one in seen[::2]}) == 2  # in either order


def test_on_eight_devices():
  """The cells are those of one device."""
  mesh = sharding.make_mesh(MeshConfig(1, -1, 1, 1))
  is_token_BL = np.tile(alike(episodes.tokens_and_mask()[1]), (8, 1))
  place = functools.partial(
    shared_prompts.place, prompt_length=PROMPT, group=GROUP, rows=24, shards=8
  )
  alone = place(is_token_BL)
  with jax.set_mesh(mesh):
    spread = jax.jit(place)(jax.device_put(is_token_BL, sharding.batch_sharding(mesh)))
  jax.tree.map(np.testing.assert_array_equal, spread, alone)
