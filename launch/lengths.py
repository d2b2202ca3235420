"""How often the loops run whose length depends on the answers: decoding, refilling of slots, rows of several episodes.

The compiled program gives the cost of one turn of such a loop. How many there are follows from the lengths of prompts
and answers. Without a mean, all are as long as they may be, which is the bound. With a mean, lengths are drawn: they
are assumed to be geometric and cut at the limit, which means that an answer ends with the same probability at every
token. Called by planning.py and sketch.py. Draws are the same at every call.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from instructjax.core.config import Config, PPOConfig
from instructjax.core.errors import UserError

_DRAWS = 32  # simulations of a rollout over which turns are averaged


@dataclasses.dataclass(frozen=True)
class Means:
  """Mean lengths of prompts and answers [tokens]; None is as long as they may be."""

  prompt: float | None = None
  response: float | None = None


BOUND = Means()


@dataclasses.dataclass(frozen=True)
class Work:
  """What a rollout and the episodes' rows come to.

  Attributes:
    steps: rows decoded at once, in all data shards together -> expected decode steps with so many.
    prefills: rows read by one prefill, and how often it runs.
    scored, trained: width of rows -> expected number of chunks of it, for the scoring of a batch and for a minibatch;
      None where every episode has a padded row of its own.
    loops: pattern of a loop's op_name -> turns of the loop each time that it is entered.
  """

  steps: Mapping[int, float]
  prefills: tuple[int, float]
  scored: Mapping[int, float] | None
  trained: Mapping[int, float] | None
  loops: Mapping[str, float]

  def turns(self, op_name: str) -> float | None:
    """The expected turns of a loop each time that it is entered; None if the lengths do not decide them."""
    return next((n for pattern, n in self.loops.items() if re.search(pattern, op_name)), None)


def require_mean(name: str, mean: float | None, limit: int):
  """Checks that a mean length is possible.

  Args:
    name: `prompt` or `response`.
    mean: mean length [tokens]; None is not checked.
    limit: the greatest length [tokens].
  Raises:
    UserError: the mean is not between 1 and the limit.
  """
  if mean is not None and not 1 <= mean <= limit:
    raise UserError(
      f"--mean_{name}={mean:g} must be from 1 to config.data.max_{name}_length={limit}"
    )


def go_on_probability(mean: float, limit: int) -> float:
  """The probability that an answer continues after a token, for which lengths cut at `limit` have this mean."""
  low, high = 0.0, 1.0
  # The mean grows with the probability q, so q is found by bisection. 40 halvings give it to 1e-12.
  for _ in range(40):
    middle = (low + high) / 2
    # P(length > k) = q^k. The mean is the sum of these for k = 0 to limit - 1.
    if (1 - middle**limit) / (1 - middle) < mean:
      low = middle
    else:
      high = middle
  return low


def draw(mean: float | None, limit: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Random lengths with this mean, cut at the limit; all as long as the limit if there is no mean."""
  if mean is None or mean >= limit:
    return np.full(shape, limit)
  go_on = go_on_probability(mean, limit)
  if go_on == 0:
    return np.ones(shape, int)
  # Inverse sampling: the largest length that is reached with a probability above a uniform random number.
  uniform = 1 - np.random.default_rng(seed).random(shape)
  return np.minimum(1 + np.floor(np.log(uniform) / math.log(go_on)).astype(int), limit)


@dataclasses.dataclass(frozen=True)
class Turns:
  """What a rollout in slots does.

  Attributes:
    rounds: turns of the loop that refills and decodes.
    refills: times that each shard gives a free slot a row.
    stages: prefills of rows that wait.
    steps: decode steps by the slots of a shard; those of the first loop come first.
  """

  rounds: int
  refills: int
  stages: int
  steps: Mapping[int, int]


def in_slots(length_XQ: np.ndarray, slots: int) -> Turns:
  """Plays a rollout of rl/slots.py: shards that refill and decode in step with each other.

  Args:
    length_XQ: length of each answer, by shard and place in its queue.
    slots: slots of a shard.
  """
  shards, queue = length_XQ.shape
  widths = [slots]
  while widths[-1] >= 4:
    widths.append(widths[-1] // 2)
  floors = [*widths[1:], 0]
  # The prefill gives an answer's first token, so that many steps are left.
  left_XS = np.zeros((shards, slots), int)
  taken_X, staged_X = np.zeros(shards, int), np.zeros(shards, int)
  rounds = refills = stages = 0
  steps = dict.fromkeys(widths, 0)
  while np.any(taken_X < queue):
    rounds += 1
    while True:
      free_XS, waits_X = left_XS == 0, taken_X < queue
      can_take_X = free_XS.any(axis=1) & waits_X
      if not can_take_X.any():
        break
      if np.any(can_take_X & (staged_X <= taken_X)):
        stages += 1
        staged_X = np.minimum(taken_X + slots, queue)
      refills += 1
      for x in np.flatnonzero(can_take_X & (staged_X > taken_X)):
        left_XS[x, np.argmax(free_XS[x])] = length_XQ[x, taken_X[x]] - 1
        taken_X[x] += 1
    waits_X = taken_X < queue
    if waits_X.any():
      ahead = int(left_XS[waits_X].min())
      steps[slots] += ahead
      left_XS = np.maximum(left_XS - ahead, 0)
  for width, floor in zip(widths, floors):
    # Until no shard has more than `floor` busy slots.
    ahead = int(np.sort(left_XS, axis=1)[:, slots - floor - 1].max())
    steps[width] += ahead
    left_XS = np.maximum(left_XS - ahead, 0)
  return Turns(rounds, refills, stages, steps)


def work(config: Config, cfg: PPOConfig, shards: int, means: Means) -> Work:
  """What an iteration of RL comes to.

  Args:
    config: the run's config.
    cfg: the PPO settings of the stage.
    shards: parts that rows are split into.
    means: lengths of prompts and answers.
  """
  rows, slots = cfg.batch_size, config.rollout.slots
  data = config.data
  lengths = functools.partial(draw, means.response, data.max_response_length)
  scored, trained, loops = _shared(config, cfg, shards, means)
  if slots in (0, rows):
    longest = [lengths((rows,), seed).max() - 1 for seed in range(_DRAWS)]
    steps = float(np.mean(longest))
    from instructjax.rl.sampling import decode_loops  # only now, because it imports JAX

    start = 1
    for name, stop in decode_loops(config.execution.layers, data.max_response_length):
      loops[rf"/rollout/{name}/while$"] = min(max(1 + steps - start, 0), stop - start)
      start = stop
    return Work({rows: steps}, (rows, 1.0), scored, trained, loops)
  limit = data.max_response_length
  played = _played(means.response, limit, (shards, rows // shards), slots // shards)
  mean = lambda of: float(np.mean([of(one) for one in played]))
  rounds, refills, stages = (mean(lambda one, name=name: getattr(one, name)) for name in _COUNTS)
  steps = {width: mean(lambda one, width=width: one.steps[width]) for width in played[0].steps}
  first, *narrower = steps
  loops |= {
    r"/slots/while$": rounds,
    r"/refill/while$": refills / rounds,
    r"/stage/while$": stages / refills,
    r"/decode/while$": steps[first] / rounds,
    **{rf"/decode_{width}/while$": steps[width] for width in narrower},
  }
  of_all = {width * shards: number for width, number in steps.items()}
  return Work(of_all, (slots, stages), scored, trained, loops)


_COUNTS = ("rounds", "refills", "stages")


# A plan asks again for each setting that it tries, and few of them change the answer.
@functools.cache
def _played(
  mean: float | None, limit: int, queues: tuple[int, int], slots: int
) -> tuple[Turns, ...]:
  """Rollouts in slots, one for each draw of lengths; `queues` are shards and answers of each."""
  return tuple(in_slots(draw(mean, limit, queues, seed), slots) for seed in range(_DRAWS))


def _shared(config: Config, cfg: PPOConfig, shards: int, means: Means):
  """(scored, trained, loops) of `Work`, for rows that several episodes share; (None, None, {}) without such rows."""
  if not cfg.packed_rows:
    return None, None, {}
  from instructjax.stages import rl_nets  # JAX, after the environment is set, see topology.py

  is_shared = cfg.share_prompts and cfg.samples_per_prompt > 1
  is_shared = is_shared and rl_nets.has_room(config, cfg, cfg.packed_rows, shards)
  if is_shared and config.execution.attention not in ("auto", "splash"):
    raise UserError(
      "config.ppo.share_prompts is not known to the planner, and attention="
      f"{config.execution.attention!r} makes use of it; plan without it: each answer then has a prompt of its own"
    )
  limits = config.data.max_prompt_length, config.data.max_response_length
  minibatch = cfg.batch_size // cfg.num_minibatches
  scored, trained = (
    _packed(means, limits, episodes, cfg.packed_rows, shards)
    for episodes in (cfg.batch_size, minibatch)
  )
  loops = {
    rf"/{where}(/.*)?/rows_of_{width}/while$": number
    for where, found in (("score", scored), ("update", trained))
    for width, number in found.items()
  }
  return scored, trained, loops


@functools.cache
def _packed(
  means: Means, limits: tuple[int, int], episodes: int, rows: int, shards: int
) -> Mapping[int, float]:
  """Width of rows -> expected chunks of `rows` rows of it; `limits` are those of prompts and of answers."""
  found = [
    _chunks(
      draw(means.prompt, limits[0], (episodes,), seed)
      + draw(means.response, limits[1], (episodes,), seed + 1000),
      sum(limits),
      rows,
      shards,
    )
    for seed in range(_DRAWS)
  ]
  return {width: float(np.mean([one[width] for one in found])) for width in found[0]}


def _chunks(length_B: np.ndarray, longest: int, rows: int, shards: int) -> dict[int, int]:
  """Width of rows -> chunks of `rows` rows of it, where shared_rows.py places episodes of these lengths."""
  from instructjax.rl import shared_rows  # JAX, after the environment is set, see topology.py

  is_token_BL = np.arange(longest)[None] < length_B[:, None]
  ends = np.asarray(_first_fit(rows, shards)(is_token_BL))
  return dict(zip(shared_rows.row_widths(longest, rows, shards), np.diff(ends, prepend=0).tolist()))


@functools.cache
def _first_fit(rows: int, shards: int):
  import jax

  from instructjax.rl import shared_rows

  return jax.jit(
    lambda is_token_BL: shared_rows.first_fit(is_token_BL, rows=rows, shards=shards).end_K
  )
