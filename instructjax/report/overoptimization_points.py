"""Over-optimisation at the checkpoints of PPO with beta = 0: few points on the test prompts, with 95% intervals.

overoptimization.py has every iteration of its log, which the policy itself has answered; here it is the weights that
are judged, by default an average over iterations. Called by page.py, and drawn by panels.py. Pure functions of what
evaluation measured.
"""

from collections.abc import Sequence

import numpy as np

from instructjax.report import intervals, overoptimization, tables
from instructjax.report.overoptimization import Point
from instructjax.report.results import Results

_RUN = "ppo_beta0"


def of_results(results: Results, *, bootstrap: int, seed: int) -> list[Point]:
  """The policy at its checkpoints and at its end; [] if no checkpoints of it were measured.

  Prompts are resampled for all measurements of a point together.

  Args:
    results: what evaluation measured.
    bootstrap: number of resamples.
    seed: of the resampling.
  """
  init, along = results.measured.get("ppo_init"), results.along(_RUN)
  if init is None or not along:
    return []
  found = []
  for step, policy in zip([*results.checkpoints[_RUN], None], along, strict=True):
    mean = lambda values: intervals.mean_of(
      values, results.samples_per_prompt, bootstrap, np.random.default_rng(seed)
    )
    kl, bounds = mean(policy.kl)
    scores = {
      key: mean((getattr(policy, key) - getattr(init, key)) / deviation)
      for key, deviation in overoptimization.deviations(init).items()
    }
    found.append(Point(step, (_root(kl), [_root(bound) for bound in bounds]), scores))
  return found


def _root(kl: float) -> float:
  """sqrt(KL); a KL near 0 may be estimated below 0."""
  return float(np.sqrt(max(kl, 0.0)))


def in_words(points: Sequence[Point]) -> str:
  """The numbers of the points, for who cannot see them in the figure; '' without any."""
  number = tables.number
  show = lambda value, bounds: f"{number(value)} [{number(bounds[0])}, {number(bounds[1])}]"
  told = []
  for point in points:
    when = "at the end" if point.step is None else f"after {point.step} iterations"
    gained = [f"{key} {show(*pair)}" for key, pair in point.scores.items()]
    told.append(f"{when} {', '.join([f'd = {show(*point.distance)}', *gained])}")
  return "; ".join(told)
