"""Schedules, and Adam: by hand, against a NumPy loop, and beside TensorFlow's placement of epsilon."""

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
  clip_by_global_norm,
  is_decayed,
  make_optimizer,
  make_schedule,
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
    {"warmup_start": -0.1},
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
  np.testing.assert_allclose(first_update(1e-6, b2=b2), pytorch, rtol=1e-4)
  of_loop = [-adam_loop([1e-6], kind, b2, 1.0)[0] for kind in ("pytorch", "tensorflow")]
  np.testing.assert_allclose(of_loop, [pytorch, tensorflow], rtol=1e-4)


def adam_loop(grads, placement, b2=0.95, learning_rate=0.1, b1=0.9, eps=1e-5):
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


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_details_31_adam_equals_a_loop(b2):
  grads = 1e-5 * np.random.default_rng(0).normal(size=20)  # as small as eps, so that eps matters
  opt = optimizer(b2=b2)

  @jax.jit
  def step(params, state, grad):
    updates, state = opt.update({"x": grad}, state, params)
    return optax.apply_updates(params, updates), state

  params = {"x": np.zeros(())}
  state, xs = opt.init(params), []
  for grad in grads:
    params, state = step(params, state, np.float32(grad))
    xs.append(params["x"])
  np.testing.assert_allclose(xs, adam_loop(grads, "pytorch", b2), rtol=1e-4, atol=1e-7)
  assert abs(xs[0]) > 1e-4 and not np.allclose(xs, adam_loop(grads, "tensorflow", b2), rtol=0.2)


def test_details_31_placements_differ_early_for_small_gradients_only():
  b2 = 0.999
  # Far below eps the ratio of the first updates is 1 / sqrt(1 - b2) = 31.6; far above it is 1.
  for grad, ratio in ((1e-10, 1 / math.sqrt(1 - b2)), (1.0, 1.0)):
    tensorflow = -adam_loop([grad], "tensorflow", b2, 1.0)[0]
    np.testing.assert_allclose(first_update(grad, b2=b2) / tensorflow, ratio, rtol=1e-3)
  # TensorFlow's formula with eps * sqrt(1 - b2^t) is PyTorch's: here t = 1.
  corrected = -adam_loop([1e-6], "tensorflow", b2, 1.0, eps=1e-5 * math.sqrt(1 - b2))[0]
  np.testing.assert_allclose(corrected, first_update(1e-6, b2=b2), 1e-4)
  # And the difference fades as b2^t does: with b2 = .95, by step 400.
  steps = [np.diff(adam_loop([1e-6] * 400, p)) for p in ("pytorch", "tensorflow")]
  np.testing.assert_allclose(steps[0][0] / steps[1][0], 2.98, rtol=0.01)  # t = 2
  np.testing.assert_allclose(steps[0][-1], steps[1][-1], rtol=1e-4)


def scale_by_adam_tensorflow(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """lm-human-preferences' Adam, TensorFlow 1's, with the "epsilon hat" of arXiv:1412.6980 (end of sec. 2).

  update = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

  With eps added after the bias correction, as PyTorch and optax do, eps would read
  eps * sqrt(1 - b2^t) here: far smaller in the first steps, and the updates of weights with small
  gradients are larger.
  """

  def init(params):
    return optax.ScaleByAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params),
      nu=optax.tree.zeros_like(params),
    )

  def update(grads, state, params=None):
    del params
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    count = optax.safe_increment(state.count)
    step = count.astype(jnp.float32)
    scale = jnp.sqrt(1 - b2**step) / (1 - b1**step)
    updates = jax.tree.map(lambda m, v: scale.astype(m.dtype) * m / (jnp.sqrt(v) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


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
  tensorflow = optax.chain(
    scale_by_adam_tensorflow(b1=0.9, b2=0.999, eps=1e-5), optax.scale_by_learning_rate(0.1)
  )
  for placement, opt in (("pytorch", optimizer(b2=0.999)), ("tensorflow", tensorflow)):

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
  opt = optimizer(clip_norm=1.0, eps=1.0)
  updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
  np.testing.assert_allclose(updates["a"], -0.1 * 0.6 / 1.6, rtol=1e-5)
  np.testing.assert_allclose(updates["b"], -0.1 * 0.8 / 1.8, rtol=1e-5)
  opt = optimizer(clip_norm=None, eps=1.0)
  updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
  np.testing.assert_allclose(updates["a"], -0.1 * 6 / 7, rtol=1e-5)


def test_gradients_within_the_norm_stay_as_they_are():
  """To the bit, at the norm itself too; all-zero gradients stay zero and finite."""
  clip = jax.jit(lambda grads: clip_by_global_norm(grads, 10.0))
  for scale in (1.0, 0.5, 1e-6, 0.0):  # norms of 10 and less
    grads = {"a": np.float32(6 * scale), "b": np.full((1, 1), 8 * scale, np.float32)}
    jax.tree.map(np.testing.assert_array_equal, clip(grads), grads)
  clipped = clip({"a": np.float32(60), "b": np.float32(80)})
  np.testing.assert_allclose([clipped["a"], clipped["b"]], [6, 8], rtol=1e-6)


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


def test_updates_have_the_types_of_the_parameters():
  opt = optimizer(clip_norm=1.0, weight_decay=0.1)
  params = {"w": jnp.ones((2, 3)), "low": jnp.ones((4,), jnp.bfloat16)}
  updates, state = jax.jit(opt.update)(params, opt.init(params), params)
  assert {name: x.dtype for name, x in updates.items()} == {"w": jnp.float32, "low": jnp.bfloat16}
  assert state[1].count.dtype == jnp.int32 and state[1].count == 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_state_is_sharded_like_the_parameters(weight_decay):
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PS("fsdp"))
  params = {"w": jax.device_put(np.ones((16, 4)), split)}
  opt = optimizer(weight_decay=weight_decay, clip_norm=1.0)
  shapes = jax.eval_shape(opt.init, params)  # shapes are all that a restore needs
  assert shapes[1].mu["w"].shape == (16, 4)
  updates, state = jax.jit(opt.update)(params, opt.init(params), params)
  for x in (updates["w"], state[1].mu["w"], state[1].nu["w"]):
    assert x.sharding.is_equivalent_to(split, 2)
