"""The reward model's ranking loss (the paper's eq. 1) and the calibration of its probabilities.

Called by stages/rm.py. Imports no config and no model.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from instructjax.ops.masked import masked_mean


def preference_pairs(rank_BC: jax.Array, is_valid_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """All ordered pairs (i, j) of a prompt's answers that the labeler ranked.

  Args:
    rank_BC: integer rank of each answer; lower is better, equal ranks are a tie. It may be anything where there is no
      answer.
    is_valid_BC: True on real answers; prompts with fewer answers are padded.
  Returns:
    (is_better_BCC, is_tie_BCC). At [b, i, j] they say whether i was preferred to j, and whether i and j are two answers
    of equal rank. Each tie appears twice, at [i, j] and at [j, i].
  """
  chex.assert_rank(rank_BC, 2)
  chex.assert_equal_shape([rank_BC, is_valid_BC])
  chex.assert_type([rank_BC, is_valid_BC], [int, bool])
  rank_i_BCC, rank_j_BCC = rank_BC[:, :, None], rank_BC[:, None, :]
  is_pair_BCC = is_valid_BC[:, :, None] & is_valid_BC[:, None, :]
  is_same_CC = jnp.eye(rank_BC.shape[1], dtype=bool)
  is_better_BCC = is_pair_BCC & (rank_i_BCC < rank_j_BCC)
  is_tie_BCC = is_pair_BCC & (rank_i_BCC == rank_j_BCC) & ~is_same_CC[None]
  return is_better_BCC, is_tie_BCC


def _targets(is_better_BCC: jax.Array, is_tie_BCC: jax.Array, ties: str) -> jax.Array:
  """The weight in the loss of i being preferred to j, at [b, i, j]."""
  target_BCC = is_better_BCC.astype(jnp.float32)
  if ties == "half":
    # A tie appears at [i, j] and at [j, i], which gives the two halves of its cross-entropy.
    target_BCC += 0.5 * is_tie_BCC.astype(jnp.float32)
  return target_BCC


def usable(rank_BC: jax.Array, is_valid_BC: jax.Array, *, ties: str) -> tuple[jax.Array, jax.Array]:
  """What `ranked_preference_loss` takes its means over; arguments as there.

  Returns:
    (is_better_BCC, has_pair_B). The accuracy is a mean over the pairs (i, j) in which i was preferred to j; the loss is
    a mean over the prompts with a usable pair.
  """
  is_better_BCC, is_tie_BCC = preference_pairs(rank_BC, is_valid_BC)
  return is_better_BCC, jnp.any(_targets(is_better_BCC, is_tie_BCC, ties) > 0, axis=(1, 2))


def ranked_preference_loss(
  score_BC: jax.Array, rank_BC: jax.Array, is_valid_BC: jax.Array, *, ties: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The reward model's loss: the paper's eq. 1 over all pairs of each prompt's answers.

  -1/C(K,2) * sum over pairs of log sigmoid(score_winner - score_loser), mean over prompts, where K is the prompt's own
  number of answers. The paper leaves two choices open:
  - A dropped tie still counts in C(K,2), as eq. 1 is printed. So a prompt with many ties weighs less.
  - The mean is over prompts with at least one usable pair. Other prompts, with one answer or with dropped ties only,
    are left out of the sum and of the count.

  Args:
    score_BC: reward model's score of each answer.
    rank_BC: integer rank; lower is better, equal ranks are ties.
    is_valid_BC: True on real answers.
    ties: 'drop', as the paper does, or 'half': cross-entropy with a target of 1/2 for a tied pair, which is
      -(log sigmoid(d) + log sigmoid(-d)) / 2 for a score difference of d. Departs from paper: 'half'.
  Returns:
    (loss, metrics), float32 scalars.
    accuracy: share of strictly ranked pairs whose winner scores higher; equal scores count 1/2.
    mean_margin: mean over these pairs of the winner's score minus the loser's.
    num_pairs: number of these pairs.
    num_ties: number of tied pairs, used or not.
    num_prompts: prompts with a usable pair, over which the loss is a mean.
  Raises:
    ValueError: an unknown value of `ties`.
  """
  if ties not in ("drop", "half"):
    raise ValueError(f"preference loss: ties={ties!r} must be 'drop' or 'half'.")
  arrays = [score_BC, rank_BC, is_valid_BC]
  chex.assert_rank(score_BC, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, int, bool])

  score_BC = jnp.where(is_valid_BC, score_BC, 0).astype(jnp.float32)
  margin_BCC = score_BC[:, :, None] - score_BC[:, None, :]
  is_better_BCC, is_tie_BCC = preference_pairs(rank_BC, is_valid_BC)
  target_BCC = _targets(is_better_BCC, is_tie_BCC, ties)

  num_answers_B = jnp.sum(is_valid_BC, axis=1, dtype=jnp.float32)
  num_comparisons_B = num_answers_B * (num_answers_B - 1) / 2
  # -log sigmoid(d) is softplus(-d), which stays finite for any margin.
  nll_B = jnp.sum(target_BCC * jax.nn.softplus(-margin_BCC), axis=(1, 2))
  has_pair_B = jnp.any(target_BCC > 0, axis=(1, 2))
  loss = masked_mean(nll_B / jnp.maximum(num_comparisons_B, 1), has_pair_B)

  is_correct_BCC = 0.5 * (1 + jnp.sign(margin_BCC))
  return loss, {
    "accuracy": masked_mean(is_correct_BCC, is_better_BCC),
    "mean_margin": masked_mean(margin_BCC, is_better_BCC),
    "num_pairs": jnp.sum(is_better_BCC, dtype=jnp.float32),
    "num_ties": jnp.sum(is_tie_BCC, dtype=jnp.float32) / 2,
    "num_prompts": jnp.sum(has_pair_B, dtype=jnp.float32),
  }


class Calibration(NamedTuple):
  """Predicted confidence compared with observed accuracy, for each bin of confidence.

  Attributes:
    confidence: mean predicted probability of the answer that the model prefers, in [.5, 1]; NaN in an empty bin.
    accuracy: share of the bin's pairs in which the labeler preferred that answer too; NaN in an empty bin.
    count: pairs in the bin.
    expected_error: expected calibration error: the mean of |confidence - accuracy| over bins, weighted by count.
  """

  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray
  expected_error: float


def calibration(score_w_minus_l: np.ndarray, *, num_bins: int = 10) -> Calibration:
  """How often a reward model is right when its confidence is p = sigmoid(|score_w - score_l|).

  A pair can be read from either side: p that w wins, or 1 - p that l wins. Each is counted for the answer that the
  model prefers, so the bins, of equal width, cover [.5, 1].

  Args:
    score_w_minus_l: score of the labeler's choice minus the score of the other answer, one number for each pair. Any
      shape.
    num_bins: number of bins.
  Raises:
    ValueError: fewer than one bin, no pair, or a difference that is not finite.
  """
  margin = np.asarray(score_w_minus_l, np.float64).ravel()
  if num_bins < 1:
    raise ValueError(f"calibration: num_bins={num_bins} must be at least 1.")
  if margin.size == 0 or not np.isfinite(margin).all():
    raise ValueError(
      f"calibration: the {margin.size} score differences must be finite and at least one,"
      f" got {np.count_nonzero(~np.isfinite(margin))} that are not finite."
    )
  confidence = 1 / (1 + np.exp(-np.abs(margin)))
  is_correct = 0.5 * (1 + np.sign(margin))
  bin_index = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
  count = np.bincount(bin_index, minlength=num_bins)
  with np.errstate(invalid="ignore"):
    mean_confidence = np.bincount(bin_index, confidence, num_bins) / count
    mean_accuracy = np.bincount(bin_index, is_correct, num_bins) / count
  error = np.nansum(np.abs(mean_confidence - mean_accuracy) * count) / margin.size
  return Calibration(mean_confidence, mean_accuracy, count, float(error))
