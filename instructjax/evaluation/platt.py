"""Binary scores: how well they tell two classes apart (AUC), and the probabilities that Platt scaling gives them.

Called by trained_scorer.py.
"""

import numpy as np

_STEPS = 100


def _two_classes(score_N, is_positive_N) -> tuple[np.ndarray, np.ndarray, int, int]:
  """The scores, which of them are positive, and how many are and are not.

  Raises:
    ValueError: one of the two classes is empty.
  """
  score_N, is_positive_N = np.asarray(score_N, np.float64), np.asarray(is_positive_N, bool)
  positives = int(is_positive_N.sum())
  negatives = len(is_positive_N) - positives
  if not positives or not negatives:
    raise ValueError("both classes must be there")
  return score_N, is_positive_N, positives, negatives


def auc(score_N: np.ndarray, is_positive_N: np.ndarray) -> float:
  """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

  Raises:
    ValueError: one of the two classes is empty.
  """
  score_N, is_positive_N, positives, negatives = _two_classes(score_N, is_positive_N)
  _, place_N, count_U = np.unique(score_N, return_inverse=True, return_counts=True)
  # Equal scores share the mean of their ranks, which are counted from 1.
  rank_U = np.cumsum(count_U) - (count_U - 1) / 2
  above = rank_U[place_N][is_positive_N].sum() - positives * (positives + 1) / 2
  return float(above / (positives * negatives))


def fit(score_N: np.ndarray, is_positive_N: np.ndarray) -> tuple[float, float]:
  """Slope and offset of the probability sigmoid(slope * score + offset), by maximum likelihood.

  Targets are drawn in a little, as Platt (1999) does, so that separable scores have a finite slope.

  Raises:
    ValueError: one of the two classes is empty.
  """
  score_N, is_positive_N, positives, negatives = _two_classes(score_N, is_positive_N)
  target_N = np.where(is_positive_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
  mean, scale = score_N.mean(), score_N.std() or 1.0
  x_N2 = np.stack([(score_N - mean) / scale, np.ones_like(score_N)], axis=1)
  weight_2 = np.zeros(2)
  for _ in range(_STEPS):
    p_N = 1 / (1 + np.exp(-np.clip(x_N2 @ weight_2, -50, 50)))
    slope_22 = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + 1e-9 * np.eye(2)
    step_2 = np.linalg.solve(slope_22, x_N2.T @ (target_N - p_N))
    # A step is no longer than the scores are wide, so that it cannot overshoot where the curve is flat.
    weight_2 += step_2 / max(1.0, float(np.abs(step_2).max()))
    if np.abs(step_2).max() < 1e-10:
      break
  slope = weight_2[0] / scale
  return float(slope), float(weight_2[1] - slope * mean)


def probability(score_N: np.ndarray, slope: float, offset: float) -> np.ndarray:
  """What `fit` makes of scores."""
  return 1 / (1 + np.exp(-np.clip(slope * np.asarray(score_N, np.float64) + offset, -500, 500)))
