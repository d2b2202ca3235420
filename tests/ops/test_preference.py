"""Eq. 1: by hand, against a loop over pairs, and blind to padding; calibration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops.preference import calibration, preference_pairs, ranked_preference_loss

jitted_loss = jax.jit(ranked_preference_loss, static_argnames="ties")
SOFTPLUS = {d: math.log1p(math.exp(d)) for d in (-2, -1, 0, 1, 2)}


def loss_of(score_BC, rank_BC, is_valid_BC=None, ties="drop"):
  score_BC, rank_BC = jnp.array(score_BC, jnp.float32), jnp.array(rank_BC)
  if is_valid_BC is None:
    is_valid_BC = np.ones(rank_BC.shape, bool)
  return jitted_loss(score_BC, rank_BC, is_valid_BC, ties=ties)


def random_rankings(seed):
  rng = np.random.default_rng(seed)
  num_answers_B = np.array([4, 9, 6, 2, 1, 0])
  is_valid_BC = np.arange(9) < num_answers_B[:, None]
  score_BC = rng.normal(size=(6, 9)).astype(np.float32)
  rank_BC = rng.integers(1, 5, size=(6, 9)).astype(np.int32)  # 9 answers on 4 ranks: many ties
  rank_BC[3] = 1  # two answers, tied
  return score_BC, rank_BC, is_valid_BC


def loss_loop(score_BC, rank_BC, is_valid_BC, ties):
  per_prompt = []
  for score_C, rank_C, is_valid_C in zip(score_BC, rank_BC, is_valid_BC, strict=True):
    answers = np.flatnonzero(is_valid_C)
    terms = []
    for i, j in itertools.combinations(answers, 2):
      p = 1 / (1 + math.exp(score_C[j] - score_C[i]))
      if rank_C[i] == rank_C[j]:
        if ties == "half":
          terms.append(-0.5 * math.log(p) - 0.5 * math.log(1 - p))
      else:
        terms.append(-math.log(p if rank_C[i] < rank_C[j] else 1 - p))
    if terms:
      per_prompt.append(sum(terms) / math.comb(len(answers), 2))
  return np.mean(per_prompt)


def test_hand_worked():
  # Scores 1, 0, 2 ranked 1, 2, 3: differences winner - loser are 1, -1, -2, over C(3, 2) = 3.
  loss, metrics = loss_of([[1, 0, 2]], [[1, 2, 3]])
  np.testing.assert_allclose(loss, (SOFTPLUS[-1] + SOFTPLUS[1] + SOFTPLUS[2]) / 3, rtol=1e-6)
  np.testing.assert_allclose(loss, 1.251151, rtol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(metrics["mean_margin"], -2 / 3, rtol=1e-6)
  assert (metrics["num_pairs"], metrics["num_ties"], metrics["num_prompts"]) == (3, 0, 1)


def test_ties_hand_worked():
  # The same with the first two tied. Dropped, the tie still counts among the C(3, 2) = 3; as a
  # half, it adds (softplus(1) + softplus(-1)) / 2.
  strict = SOFTPLUS[1] + SOFTPLUS[2]
  loss, metrics = loss_of([[1, 0, 2]], [[1, 1, 2]])
  np.testing.assert_allclose(loss, strict / 3, rtol=1e-6)
  assert (metrics["num_pairs"], metrics["num_ties"], metrics["accuracy"]) == (2, 1, 0)
  loss, half_metrics = loss_of([[1, 0, 2]], [[1, 1, 2]], ties="half")
  np.testing.assert_allclose(loss, (strict + (SOFTPLUS[1] + SOFTPLUS[-1]) / 2) / 3, rtol=1e-6)
  assert half_metrics == metrics  # accuracy and margin are over strict pairs either way


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_equals_a_loop_over_pairs(ties):
  batch = random_rankings(0)
  loss, metrics = jitted_loss(*batch, ties=ties)
  np.testing.assert_allclose(loss, loss_loop(*batch, ties), rtol=1e-5)
  assert metrics["num_pairs"] + metrics["num_ties"] == sum(math.comb(k, 2) for k in (4, 9, 6, 2))
  assert metrics["num_prompts"] == (4 if ties == "half" else 3)  # the fourth is one tied pair


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_padding_never_matters(ties):
  score_BC, rank_BC, is_valid_BC = random_rankings(1)
  fn = jax.jit(jax.value_and_grad(functools.partial(jitted_loss, ties=ties), has_aux=True))
  clean = jax.device_get(fn(score_BC, rank_BC, is_valid_BC))
  np.testing.assert_array_equal(clean[1][~is_valid_BC], 0)
  np.testing.assert_array_equal(clean[1][4:], 0)  # one answer, and none
  for score, rank in ((np.nan, -5), (np.inf, 1), (-100.0, 99)):
    garbage = fn(
      np.where(is_valid_BC, score_BC, np.float32(score)),
      np.where(is_valid_BC, rank_BC, np.int32(rank)),
      is_valid_BC,
    )
    jax.tree.map(np.testing.assert_array_equal, clean, garbage)


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_answers_may_come_in_any_order_and_scores_may_shift(ties):
  score_BC, rank_BC, is_valid_BC = random_rankings(2)
  order = np.random.default_rng(3).permutation(9)
  fn = functools.partial(jitted_loss, ties=ties)
  loss, metrics = fn(score_BC, rank_BC, is_valid_BC)
  for other in (
    (score_BC[:, order], rank_BC[:, order], is_valid_BC[:, order]),
    (score_BC + 3, rank_BC * 10, is_valid_BC),
  ):
    other_loss, other_metrics = fn(*other)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    assert metrics["accuracy"] == other_metrics["accuracy"]


def test_every_prompt_weighs_the_same():
  # Eq. 1's 1/C(K,2): a prompt with 9 answers has 36 pairs but the weight of one with 2.
  two = [[0.0, 1.0] + [0.0] * 7]
  nine = [[0.5 * i for i in range(9)]]
  rank_1C, rank_BC = [list(range(1, 10))], [list(range(1, 10))] * 2
  is_two_1C = np.arange(9)[None] < 2
  both = np.concatenate([is_two_1C, np.ones((1, 9), bool)])
  mean = (loss_of(two, rank_1C, is_two_1C)[0] + loss_of(nine, rank_1C)[0]) / 2
  np.testing.assert_allclose(loss_of(two + nine, rank_BC, both)[0], mean, rtol=1e-6)


def test_paper_batch_has_at_most_2304_comparisons():
  # 64 prompts of K = 9 (App. C.2).
  _, metrics = loss_of(np.zeros((64, 9)), [list(range(1, 10))] * 64)
  assert metrics["num_pairs"] == 2304
  assert metrics["accuracy"] == 0.5  # equal scores are neither right nor wrong


def test_gradient_of_one_pair():
  # d/ds_w of softplus(-(s_w - s_l)) = -sigmoid(-(s_w - s_l)); at difference 1 that is -.268941.
  grad_BC = jax.jit(jax.grad(lambda s: loss_of(s, [[2, 1]])[0]))(jnp.array([[1.0, 2.0]]))
  np.testing.assert_allclose(grad_BC, [[0.268941, -0.268941]], rtol=1e-5)


def test_half_ties_pull_scores_together_and_dropped_ones_do_nothing():
  score_BC = jnp.array([[1.0, 2.0]])
  grads = {
    t: jax.jit(jax.grad(lambda s, t=t: loss_of(s, [[1, 1]], ties=t)[0])) for t in ("half", "drop")
  }
  # d/ds of (softplus(d) + softplus(-d)) / 2 = tanh(d / 2) / 2 = .231059 at d = 1.
  np.testing.assert_allclose(grads["half"](score_BC), [[-0.231059, 0.231059]], rtol=1e-5)
  np.testing.assert_array_equal(grads["half"](np.ones((1, 2))), 0)
  np.testing.assert_array_equal(grads["drop"](score_BC), 0)
  loss, metrics = loss_of(score_BC, [[1, 1]])
  assert loss == 0 and metrics["num_prompts"] == metrics["accuracy"] == 0


def test_large_differences_stay_finite():
  fn = jax.jit(jax.value_and_grad(lambda s: loss_of(s, [[1, 2]])[0]))
  loss, grad_BC = fn(jnp.array([[-1e4, 1e4]]))
  assert loss == 2e4
  np.testing.assert_array_equal(grad_BC, [[-1, 1]])


def test_preference_pairs():
  is_better_BCC, is_tie_BCC = jax.jit(preference_pairs)(
    jnp.array([[2, 1, 2, 1]]), jnp.array([[True, True, True, False]])
  )
  assert np.argwhere(np.asarray(is_better_BCC)[0]).tolist() == [[1, 0], [1, 2]]
  assert np.argwhere(np.asarray(is_tie_BCC)[0]).tolist() == [[0, 2], [2, 0]]


def test_refuses():
  with pytest.raises(ValueError, match="ties='keep' must be 'drop' or 'half'"):
    loss_of([[1, 0]], [[1, 2]], ties="keep")
  with pytest.raises(AssertionError):
    loss_of([[1, 0]], [[1.0, 2.0]])


def test_calibration_hand_worked():
  # Sure to .75 (difference log 3): 3 of 4 right, no error. Sure to .9 (log 9): 1 of 2 right, error
  # .4. Bins of .1 from .5 to 1; the mean over the 6 pairs is (4 * 0 + 2 * .4) / 6.
  a, b = math.log(3), math.log(9.0001)
  result = calibration(np.array([a, a, a, -a, b, -b]), num_bins=5)
  np.testing.assert_array_equal(result.count, [0, 0, 4, 0, 2])
  np.testing.assert_allclose(result.confidence[[2, 4]], [0.75, 0.9], rtol=1e-5)
  np.testing.assert_allclose(result.accuracy[[2, 4]], [0.75, 0.5])
  assert np.isnan(result.accuracy[[0, 1, 3]]).all()
  np.testing.assert_allclose(result.expected_error, 0.8 / 6, rtol=1e-4)


def test_calibration_of_labels_drawn_from_the_model():
  rng = np.random.default_rng(0)
  margin = np.abs(rng.normal(scale=2, size=20000))
  is_upset = rng.random(20000) > 1 / (1 + np.exp(-margin))
  margin[is_upset] *= -1
  assert calibration(margin).expected_error < 0.015
  assert calibration(3 * margin).expected_error > 0.05  # overconfident


def test_calibration_ends_and_errors():
  result = calibration(np.array([[0.0, 1000.0]]))  # equal scores: half right at confidence .5
  assert result.expected_error == 0
  assert result.count.tolist() == [1] + [0] * 8 + [1]
  for bad in ([], [np.nan], [1.0, np.inf]):
    with pytest.raises(ValueError, match="must be finite and at least one"):
      calibration(np.array(bad))
  with pytest.raises(ValueError, match="num_bins=0"):
    calibration(np.array([1.0]), num_bins=0)
