"""Slots change how rows are decoded, never what is sampled; and they take the next prompt at once."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PromptBatch
from instructjax.parallel import sharding
from instructjax.rl import sampling
from instructjax.rl import slots as slots_lib
from tests import tiny

VOCAB, EOS, ROWS, PROMPT, RESPONSE = 23, 0, 32, 4, 9
STOPS = (EOS, 5)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def prompts():
  """Left-padded prompts of 1 to 4 tokens."""
  rng = np.random.default_rng(0)
  is_prompt_BP = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, (ROWS, 1))
  token_BP = np.where(is_prompt_BP, rng.integers(1, VOCAB, (ROWS, PROMPT)), VOCAB)
  return PromptBatch(token_BP.astype(np.int32), is_prompt_BP, np.arange(ROWS, dtype=np.int32))


@pytest.fixture(scope="module")
def policy(tiny_config, random_params):
  """policy(position, layers) -> (model, params): GQA, every second layer banded, a tenth of the tokens EOS.

  With rotary positions the banded layer has a base of its own, and the other has no positions.
  """

  def one(position, layers):
    switches = dict(position=position, layers=layers, num_layers=2, attention_window=3)
    if position == "rope":
      switches |= dict(layer_pattern="NL", rope_local_base=50.0)
    model = tiny.make_model(tiny_config, VOCAB, **switches)
    return model, random_params(model, 5)

  return one


@pytest.fixture(scope="module")
def generate(quick_jit, policy):
  """generate(position, layers, slots) -> a compiled (params, prompts) -> Rollout."""

  @functools.cache
  def one(position, layers, slots):
    model, _ = policy(position, layers)
    kwargs = dict(max_new_tokens=RESPONSE, stop_ids=STOPS, temperature=0.7, slots=slots)
    return quick_jit(
      lambda params, prompts: sampling.generate(model, params, prompts, KEY, **kwargs)
    )

  return one


@pytest.fixture(scope="module")
def expected(generate, policy, prompts):
  """expected(position, layers) -> the Rollout of the whole batch at once."""

  @functools.cache
  def one(position, layers):
    rollout = generate(position, layers, 0)(policy(position, layers)[1], prompts)
    length_B = np.sum(rollout.is_response_BR, axis=1)
    last_B = rollout.token_BL[np.arange(ROWS), PROMPT + length_B - 1]
    assert set(STOPS) <= set(last_B.tolist())  # each of them ends a row
    is_last_B = np.isin(last_B, STOPS)
    assert np.any(length_B == 1) and np.any(~is_last_B) and len(np.unique(length_B)) > 4
    return jax.tree.map(np.asarray, rollout)

  return one


def assert_same(got, expected, order=slice(None)):
  for name in ("token_BL", "is_token_BL", "is_response_BR"):
    np.testing.assert_array_equal(getattr(got, name), getattr(expected, name)[order], err_msg=name)
  np.testing.assert_allclose(
    got.behaviour_logprob_BR, expected.behaviour_logprob_BR[order], atol=1e-5
  )


@pytest.mark.parametrize(
  ("position", "layers", "slots"),
  [
    ("learned", "unroll", 2),
    ("learned", "unroll", 8),
    ("learned", "scan", 4),
    ("rope", "unroll", 5),
    ("rope", "scan", 1),
  ],
)
def test_tokens_do_not_depend_on_slots_or_order(
  generate, policy, prompts, expected, position, layers, slots
):
  run, params = generate(position, layers, slots), policy(position, layers)[1]
  rollout = run(params, prompts)
  assert_same(rollout, expected(position, layers))
  assert int(rollout.slot_steps) < int(expected(position, layers).slot_steps)
  order = np.random.default_rng(slots).permutation(ROWS)
  moved = run(params, jax.tree.map(lambda x: x[order], prompts))
  assert_same(moved, expected(position, layers), order)


def test_all_rows_at_once_is_the_plain_program(policy, prompts):
  model, params = policy("learned", "unroll")

  def program(slots):
    kwargs = dict(max_new_tokens=RESPONSE, stop_ids=(EOS,), temperature=0.7)
    kwargs |= {} if slots is None else {"slots": slots}
    run = lambda params: sampling.generate(model, params, prompts, KEY, **kwargs)
    return str(jax.make_jaxpr(run)(params))

  assert program(None) == program(0) == program(ROWS) != program(4)


@pytest.fixture(scope="module")
def scheduled(quick_jit, policy):
  """scheduled(lengths, slots) -> Rollout of rows that end where the noise says: a 1 draws EOS."""
  model, params = policy("learned", "unroll")

  @functools.partial(quick_jit, static_argnums=2)
  def run(params, uniform_BR, slots):
    rows = len(uniform_BR)
    prompts = PromptBatch(
      jnp.ones((rows, 1), jnp.int32), jnp.ones((rows, 1), bool), jnp.arange(rows)
    )
    draw = lambda _, uniform_B: (jnp.where(uniform_B < 1, 7, EOS), uniform_B)
    weights = models.decode_weights(model, params)
    return slots_lib.generate(
      model, weights, prompts, uniform_BR, draw, slots=slots, stop_ids=(EOS,)
    )

  def one(lengths, slots):
    uniform_BR = np.random.default_rng(0).uniform(0, 0.9, (len(lengths), RESPONSE))
    uniform_BR[np.arange(len(lengths)), np.array(lengths) - 1] = 1
    rollout = jax.tree.map(np.asarray, run(params, uniform_BR.astype(np.float32), slots))
    # Each row got its own noise in order, to its own end.
    is_response_BR = np.arange(RESPONSE)[None] < np.array(lengths)[:, None]
    np.testing.assert_array_equal(rollout.is_response_BR, is_response_BR)
    logprob_BR = np.where(is_response_BR, uniform_BR, 0).astype(np.float32)
    np.testing.assert_array_equal(rollout.behaviour_logprob_BR, logprob_BR)
    return rollout

  return one


@pytest.mark.parametrize(
  ("lengths", "slots", "steps", "slot_steps"),
  [
    # Row 0 ends with its first token and takes no slot. Steps 1 to 3: rows 1 and 2, 1 and 3, 1 and 3.
    ([1, 4, 2, 3], 2, 3, 6),
    # Step 1: rows 0 to 3, of which only 0 goes on. Step 2: rows 0, 4, 5 and a free slot. Then row 0 alone
    # for 3 steps, beside one free slot of the 2 that are left.
    ([6, 2, 2, 2, 2, 2], 4, 5, 4 + 4 + 3 * 2),
    # The longest comes last: 1 and 2; then for 8 steps alone beside the second slot.
    ([2, 2, 1, 9], 2, 9, 2 * 9),
    # The last row has no successor, whatever was prefilled beside it: alone among 2 slots for 8 steps.
    ([2, 2, 2, 2, 9], 4, 9, 4 + 8 * 2),
    # No row outlives its prefill.
    ([1, 1, 1, 1, 1, 1], 4, 0, 0),
  ],
)
def test_free_slots_take_the_next_row_at_once(scheduled, lengths, slots, steps, slot_steps):
  rollout = scheduled(lengths, slots)
  assert int(rollout.num_steps) == 1 + steps
  assert (
    int(rollout.slot_steps) == len(lengths) + slot_steps
  )  # a first token a row, from its prefill


def test_rows_of_every_length_through_every_width(scheduled):
  rng = np.random.default_rng(1)
  for _ in range(5):
    lengths = rng.integers(1, RESPONSE + 1, 13).tolist()  # 13 rows: the last prefill is not full
    rollout = scheduled(lengths, 9)  # which narrows twice
    # Nine slots are full while rows wait: the rest is the tail's, at most a row's length.
    waste = int(rollout.slot_steps) - sum(lengths)
    assert 0 <= waste < 9 * RESPONSE


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_eight_devices_have_a_queue_each(quick_jit, policy, prompts, expected, shape):
  model, params = policy("rope", "scan")
  mesh = sharding.make_mesh(MeshConfig(1, *shape))
  shardings, _ = models.param_shardings(mesh, model)
  kwargs = dict(max_new_tokens=RESPONSE, stop_ids=STOPS, temperature=0.7, slots=16)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings), sharding.place_batch(mesh, prompts)
    run = quick_jit(
      lambda params, prompts: sampling.generate(model, params, prompts, KEY, **kwargs)
    )
    compiled = run.lower(*placed).compile()
    assert_same(compiled(*placed), expected("rope", "scan"))
  # Inside the loops nothing travels between data shards but whether to go on.
  groups = r"replica_groups=(\{\{.*?\}\}|mesh\[.*?\] \{.*?\})"
  collective = rf" = (\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(.*{groups}.*/while/"
  found = re.findall(collective, re.sub(r"\((pred\[\], )+pred\[\]\)", "pred[]", compiled.as_text()))
  assert any(shape == "pred[]" for shape, _, _ in found)
  for shape, kind, groups in found:
    tensor_axis = (  # as JAX 0.10 to 0.12 write it
      r"\{\{0,1\},\{2,3\}.*|mesh\['axis_0'=4,'axis_1'=2(,'axis_2'=1)?\] \{'axis_1'\}"
      r"|mesh\['slice'=1,'data'=2,'fsdp'=2,'tensor'=2\] \{'tensor'\}"
    )
    is_going_on = kind == "all-reduce" and shape == "pred[]"
    assert is_going_on or re.fullmatch(tensor_axis, groups), (shape, kind, groups)


def test_slots_that_do_not_divide_over_the_shards_are_refused(policy, prompts):
  model, params = policy("rope", "scan")
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 8, 1, 1))):
    with pytest.raises(ValueError, match=r"slots=12 and rows=32 must be divisible by .* = 8"):
      kwargs = dict(max_new_tokens=RESPONSE, stop_ids=(EOS,), temperature=0.7, slots=12)
      jax.eval_shape(lambda: sampling.generate(model, params, prompts, KEY, **kwargs))


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_no_loop_copies_the_cache(policy, random_params, prompts, layers):
  model, _ = policy("rope", layers)
  # Two periods of the pattern: XLA takes a loop of a single trip apart.
  model = model.clone(network=dataclasses.replace(model.network, num_layers=4))
  params = random_params(model)
  length = 29  # columns in all, a number that nothing else has
  kwargs = dict(max_new_tokens=length - PROMPT, stop_ids=(EOS,), temperature=0.7, slots=8)
  run = lambda params: sampling.generate(model, params, prompts, KEY, **kwargs)
  text = jax.jit(run).lower(params).compile().as_text()
  loops = text[: text.index("\nENTRY ")]
  cache_shape = rf"f32\[(?:2,)?[842],2,{length},4\]"
  assert re.search(rf"= {cache_shape}\S* dynamic-update-slice\(", loops)
  assert not re.findall(rf"= {cache_shape}\S* copy(?:-start)?\(.*", loops)
