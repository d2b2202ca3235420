"""Schedules, and Adam with both placements of epsilon: by hand, against a NumPy loop."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.config import OptimConfig
from instructjax.models import transformer
from instructjax.ops.lm import token_logprob
from instructjax.ops.surrogate import clipped_surrogate
from instructjax.train.optim import (
  is_decayed,
  make_optimizer,
  make_schedule,
  scale_by_adam_tensorflow,
)
from tests import tiny

CONFIG = OptimConfig(
  learning_rate=0.1,
  schedule="constant",
  warmup_steps=0,
  warmup_start=0.0,
  end_fraction=0.0,
  b1=0.9,
  b2=0.95,
  eps=1e-5,
  eps_placement="tensorflow",
  weight_decay=0.0,
  clip_norm=None,
)
SCHEDULE = dict(
  learning_rate=2.0, num_steps=100, warmup_steps=0, warmup_start=0.0, end_fraction=0.1
)


def optimizer(num_steps=10, **changes):
  return make_optimizer(dataclasses.replace(CONFIG, **changes), num_steps)


def first_update(grad, **changes):
  params = {"x": np.zeros(())}
  opt = optimizer(learning_rate=1.0, **changes)
  return -jax.jit(opt.update)({"x": np.float32(grad)}, opt.init(params), params)[0]["x"]


def test_cosine_without_warmup_falls_to_a_tenth():
  # Paper, C.1: from the peak, no warmup, to 10%; halfway (1 + .1) / 2 of the peak.
  schedule = jax.jit(make_schedule("cosine", **SCHEDULE))
  steps = jnp.array([0, 50, 100, 200])
  rates = [schedule(step) for step in steps]
  np.testing.assert_allclose(rates, [2.0, 1.1, 0.2, 0.2], rtol=1e-5)
  np.testing.assert_allclose(schedule(25), 2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), rtol=1e-5)


def test_constant_after_a_warmup_from_a_tenth():
  # Paper, C.4: PPO warms up from 1/10 of the peak over the first 10 iterations.
  schedule = make_schedule("constant", **SCHEDULE | dict(warmup_steps=10, warmup_start=0.1))
  rates = [schedule(step) for step in (0, 5, 10, 11, 99)]
  np.testing.assert_allclose(rates, [0.2, 1.1, 2.0, 2.0, 2.0], rtol=1e-6)


def test_details_6_linear_to_zero():
  schedule = make_schedule("linear", **SCHEDULE | dict(end_fraction=0.0))
  rates = [schedule(step) for step in (0, 25, 50, 100, 101)]
  np.testing.assert_allclose(rates, [2.0, 1.5, 1.0, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_starts_after_the_warmup_and_ends_with_the_run(kind):
  schedule = make_schedule(kind, **SCHEDULE | dict(warmup_steps=20))
  rates = np.array([schedule(step) for step in range(101)])
  assert rates[0] == 0 and rates.argmax() == 20 and rates[20] == 2
  assert np.all(np.diff(rates[:21]) > 0) and np.all(np.diff(rates[20:]) < 0)
  np.testing.assert_allclose(rates[[60, 100]], [1.1, 0.2], rtol=1e-5)


@pytest.mark.parametrize(
  "kind, change, message",
  [
    ("cos", {}, "schedule='cos' must be"),
    ("cosine", {"learning_rate": 0.0}, "learning_rate=0.0 must be > 0"),
    ("cosine", {"warmup_steps": 100}, "warmup_steps=100"),
    ("constant", {"warmup_steps": -1}, "warmup_steps=-1"),
    ("linear", {"num_steps": 0}, "num_steps=0"),
    ("cosine", {"warmup_start": 1.5}, "warmup_start=1.5"),
    ("cosine", {"end_fraction": -0.1}, "end_fraction=-0.1"),
  ],
)
def test_schedule_refuses(kind, change, message):
  with pytest.raises(ValueError, match=message):
    make_schedule(kind, **SCHEDULE | change)


@pytest.mark.parametrize(
  "change",
  [
    {"eps_placement": "jax"},
    {"schedule": "step"},
    {"learning_rate": -1.0},
    {"b1": 1.0},
    {"b2": -0.1},
    {"eps": 0.0},
    {"weight_decay": -0.1},
    {"clip_norm": 0.0},
  ],
)
def test_optimizer_refuses(change):
  (name,) = change
  with pytest.raises(ValueError, match=name):
    optimizer(**change)


@pytest.mark.parametrize(
  "b2, pytorch, tensorflow",
  [
    # m = .1 g, v = (1 - b2) g^2, g = 1e-6, eps = 1e-5.
    # PyTorch: g / (g + eps) = 1 / 11, whatever b2.
    # TensorFlow: sqrt(1 - b2) g / (sqrt(1 - b2) g + eps) = 1 / (1 + 10 / sqrt(1 - b2)).
    (0.999, 1 / 11, 0.0031523),
    (0.95, 1 / 11, 0.0218714),
  ],
)
def test_details_31_first_step_hand_worked(b2, pytorch, tensorflow):
  np.testing.assert_allclose(first_update(1e-6, b2=b2, eps_placement="pytorch"), pytorch, rtol=1e-4)
  np.testing.assert_allclose(first_update(1e-6, b2=b2), tensorflow, rtol=1e-4)


def adam_loop(grads, placement, b1=0.9, b2=0.95, eps=1e-5, learning_rate=0.1):
  """Positions of a scalar that starts at 0, from the two formulas as they are printed."""
  x, m, v, xs = 0.0, 0.0, 0.0, []
  for t, g in enumerate(grads, start=1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    if placement == "tensorflow":
      rate = learning_rate * math.sqrt(1 - b2**t) / (1 - b1**t)
      x -= rate * m / (math.sqrt(v) + eps)
    else:
      x -= learning_rate * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
    xs.append(x)
  return xs


@pytest.mark.parametrize("placement", ["pytorch", "tensorflow"])
def test_details_31_adam_equals_a_loop(placement):
  grads = 1e-5 * np.random.default_rng(0).normal(size=20)  # as small as eps, so that eps matters
  opt = optimizer(eps_placement=placement)

  @jax.jit
  def step(params, state, grad):
    updates, state = opt.update({"x": grad}, state, params)
    return optax.apply_updates(params, updates), state

  params = {"x": np.zeros(())}
  state, xs = opt.init(params), []
  for grad in grads:
    params, state = step(params, state, np.float32(grad))
    xs.append(params["x"])
  np.testing.assert_allclose(xs, adam_loop(grads, placement), rtol=1e-4, atol=1e-7)
  other = {"pytorch": "tensorflow", "tensorflow": "pytorch"}[placement]
  assert abs(xs[0]) > 1e-4 and not np.allclose(xs, adam_loop(grads, other), rtol=0.2)


def test_details_31_placements_differ_early_for_small_gradients_only():
  b2 = 0.999
  # Far below eps the ratio of the first updates is 1 / sqrt(1 - b2) = 31.6; far above it is 1.
  for grad, ratio in ((1e-10, 1 / math.sqrt(1 - b2)), (1.0, 1.0)):
    pytorch = first_update(grad, b2=b2, eps_placement="pytorch")
    np.testing.assert_allclose(pytorch / first_update(grad, b2=b2), ratio, rtol=1e-3)
  # TensorFlow's formula with eps * sqrt(1 - b2^t) is PyTorch's: here t = 1.
  corrected = first_update(1e-6, b2=b2, eps=1e-5 * math.sqrt(1 - b2))
  np.testing.assert_allclose(corrected, first_update(1e-6, b2=b2, eps_placement="pytorch"), 1e-4)
  # And the difference fades as b2^t does: with b2 = .95, by step 400.
  steps = [np.diff(adam_loop([1e-6] * 400, p)) for p in ("pytorch", "tensorflow")]
  np.testing.assert_allclose(steps[0][0] / steps[1][0], 2.98, rtol=0.01)  # t = 2
  np.testing.assert_allclose(steps[0][-1], steps[1][-1], rtol=1e-4)


def test_details_31_pytorch_placement_moves_a_policy_further():
  # The blog saw approxkl 6.4 times larger after two epochs of GPT-2 (tests/golden), and clipping
  # more often. The full run is out of a unit test's reach, the direction is not: one table of
  # logits, gradients below eps, two epochs on the same samples.
  rng = np.random.default_rng(0)
  token_BR = rng.integers(0, 50, (64, 16))
  advantage_BR = 0.1 * rng.normal(size=(64, 16))
  behaviour_BR = np.full((64, 16), -math.log(50))
  is_response_BR = np.ones((64, 16), bool)

  def loss(logits_BRV):
    logprob_BR = token_logprob(logits_BRV, token_BR)
    return clipped_surrogate(logprob_BR, behaviour_BR, advantage_BR, is_response_BR, clip=0.2)

  approx_kl = {}
  for placement in ("pytorch", "tensorflow"):
    opt = optimizer(eps_placement=placement, b2=0.999)

    @jax.jit
    def step(params, state, opt=opt):
      grads, metrics = jax.grad(loss, has_aux=True)(params)
      updates, state = opt.update(grads, state, params)
      return optax.apply_updates(params, updates), state, metrics

    params = np.zeros((64, 16, 50), np.float32)
    state = opt.init(params)
    for _ in range(3):  # two epochs, and a third only to look
      params, state, metrics = step(params, state)
    approx_kl[placement] = metrics["approx_kl"]
  assert approx_kl["pytorch"] > 6 * approx_kl["tensorflow"] > 0


def test_weight_decay_is_decoupled_and_spares_biases_and_scales():
  opt = optimizer(weight_decay=0.5)
  params = {"w_DF": np.full((2, 3), 4.0), "b_up_F": np.full((2, 3), 4.0)}
  updates, _ = jax.jit(opt.update)(jax.tree.map(jnp.zeros_like, params), opt.init(params), params)
  # Zero gradients: only -learning_rate * weight_decay * w = -.1 * .5 * 4 is left.
  np.testing.assert_allclose(updates["w_DF"], -0.2, rtol=1e-6)
  np.testing.assert_array_equal(updates["b_up_F"], 0)


def test_weight_decay_of_every_parameter_of_a_model():
  # Layers are stacked, so the rank of an array does not tell a bias from a weight.
  gpt2 = dataclasses.replace(tiny.GPT2, tie_embeddings=False)
  llama = dataclasses.replace(gpt2, norm="rmsnorm", mlp="swiglu", use_bias=False, qkv_bias=True)
  decayed = set()
  for cfg, head in ((gpt2, "lm"), (gpt2, "scalar"), (llama, "lm")):
    shapes = transformer.param_shapes(tiny.make_model(cfg, 5, head))
    for path, yes in jax.tree_util.tree_leaves_with_path(is_decayed(shapes)):
      if yes:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        decayed.add(re.sub(r"layers/\d+/", "layers/", name))
  assert decayed == {
    "embedding/token_VD",
    "embedding/position_TD",
    "head/w_D",
    "head/w_VD",
    "layers/attention/w_out_GRKD",
    "layers/attention/w_qkv_DGQK",
    "layers/mlp/w_down_FD",
    "layers/mlp/w_gate_up_D2F",
    "layers/mlp/w_up_DF",
  }


def test_clipping_comes_before_adam_and_is_over_all_parameters():
  # Norm of (6, 8) is 10: clipped to 1 it is (.6, .8). A large eps keeps Adam from undoing the
  # scale: PyTorch's first update is lr * g / (|g| + 1).
  params = {"a": np.float32(0), "b": np.float32(0)}
  grads = {"a": np.float32(6), "b": np.float32(8)}
  opt = optimizer(clip_norm=1.0, eps=1.0, eps_placement="pytorch")
  updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
  np.testing.assert_allclose(updates["a"], -0.1 * 0.6 / 1.6, rtol=1e-5)
  np.testing.assert_allclose(updates["b"], -0.1 * 0.8 / 1.8, rtol=1e-5)
  opt = optimizer(clip_norm=None, eps=1.0, eps_placement="pytorch")
  updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
  np.testing.assert_allclose(updates["a"], -0.1 * 6 / 7, rtol=1e-5)


def test_schedule_counts_updates():
  opt = optimizer(num_steps=2, schedule="linear", eps=1e-8)
  params = np.zeros(())
  state = opt.init(params)
  rates = []
  update = jax.jit(opt.update)
  for _ in range(3):
    updates, state = update(np.float32(1.0), state, params)
    rates.append(-updates)
  np.testing.assert_allclose(rates, [0.1, 0.05, 0.0], rtol=1e-4)


def test_tensorflow_adam_keeps_types_under_strict_promotion():
  adam = scale_by_adam_tensorflow(b1=0.9, b2=0.95, eps=1e-5)
  params = {"w": np.ones((2, 3)), "low": jnp.ones((4,), jnp.bfloat16)}
  with jax.numpy_dtype_promotion("strict"):
    updates, state = jax.jit(adam.update)(params, adam.init(params))
  assert {name: x.dtype for name, x in updates.items()} == {"w": jnp.float32, "low": jnp.bfloat16}
  assert state.count.dtype == jnp.int32 and state.count == 1


@pytest.mark.parametrize("placement", ["pytorch", "tensorflow"])
def test_state_is_sharded_like_the_parameters(placement):
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PS("fsdp"))
  params = {"w": jax.device_put(np.ones((16, 4)), split)}
  opt = optimizer(eps_placement=placement, weight_decay=0.1, clip_norm=1.0)
  shapes = jax.eval_shape(opt.init, params)  # shapes are all that a restore needs
  assert shapes[1].mu["w"].shape == (16, 4)
  updates, state = jax.jit(opt.update)(params, opt.init(params), params)
  for x in (updates["w"], state[1].mu["w"], state[1].nu["w"]):
    assert x.sharding.is_equivalent_to(split, 2)
