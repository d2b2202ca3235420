"""The PPO step where the host computes some of the rewards: one iteration as three XLA programs.

  rollout  the policy answers
  score    the networks read the answers; meanwhile the host turns them into text and calls the reward functions
  learn    rewards, advantages and updates

They are made of the same parts as the one program of step.py, and compute the same. Called by stages/ppo.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax.core import rewards
from instructjax.core.config import PPOConfig
from instructjax.core.structs import Array, PPOState, Rollout, Samples, tree_of
from instructjax.parallel import sharding
from instructjax.rl import experience
from instructjax.rl import step as ppo_step
from instructjax.rl.experience import Frozen, Nets, Readings

# (rollout, iteration) -> name of a reward that the host computes -> float32 [B], the same on every process.
HostRewards = Callable[[Rollout, int], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class SplitStep:
  """The step (state, frozen, batch) -> (state, metrics, samples), which donates the state as the one program does.

  Attributes:
    sample: (state, frozen, prompts) -> rollout.
    read: (state, frozen, rollout) -> readings.
    learn: (state, frozen, batch, rollout, readings, values) -> what the step returns; donates the state.
    on_host: computes the other rewards.
    names: of these rewards.
    mesh: of all arrays.
  """

  sample: Any  # jitted, and so can be lowered
  read: Any
  learn: Any
  on_host: HostRewards
  names: tuple[str, ...]
  mesh: Mesh

  def __call__(
    self, state: PPOState, frozen: Frozen, batch: dict
  ) -> tuple[PPOState, dict[str, Array], Samples]:
    """Runs an iteration. Raises what `on_host` raises, before the state is given away."""
    rollout = self.sample(state, frozen, batch["prompts"])
    # Dispatched before the host reads the rollout, so that the devices work while the host does.
    readings = self.read(state, frozen, rollout)
    values = dict(self.on_host(rollout, int(state.step) + 1))
    return self.learn(
      state, frozen, batch, rollout, readings, sharding.place_rows(self.mesh, values)
    )

  def lower(self, state: PPOState, frozen: Frozen, batch: dict) -> "Lowered":
    """As of a jitted function: the programs of an iteration with these arguments."""
    given = state, frozen, batch["prompts"]
    rollout = jax.eval_shape(self.sample, *given)
    readings = jax.eval_shape(self.read, state, frozen, rollout)
    values = {name: jax.ShapeDtypeStruct(readings.score_B.shape, "float32") for name in self.names}
    return Lowered(
      (
        self.sample.lower(*given),
        self.read.lower(state, frozen, rollout),
        self.learn.lower(state, frozen, batch, rollout, readings, values),
      )
    )


@dataclasses.dataclass(frozen=True)
class Lowered:
  """The programs of an iteration, lowered or compiled, where a profile expects one."""

  programs: tuple[Any, ...]

  def compile(self) -> "Lowered":
    return Lowered(tuple(program.compile() for program in self.programs))

  def as_text(self) -> str:
    return "\n".join(program.as_text() for program in self.programs)


def make_split_step(
  nets: Nets, cfg: PPOConfig, state_shardings: PPOState, on_host: HostRewards
) -> SplitStep:
  """Compiles the three programs; arguments as `step.make_train_step`, and `on_host` as in `SplitStep`."""
  rows = ppo_step.make_rows(cfg, nets.policy.vocab_size, nets.shares_prompts)

  def rollout(state, frozen, prompts):
    key = ppo_step.iteration_keys(state)[0]
    return ppo_step.sample_rollout(nets, cfg, state, frozen, prompts, key)

  def score(state, frozen, rollout):
    return experience.read(nets, cfg, rows, state, frozen, rollout)

  def learn(state, frozen, batch, rollout, readings, values):
    scored = experience.from_readings(nets, cfg, state, rollout, readings, values)
    key = ppo_step.iteration_keys(state)[1]
    return ppo_step.learn(nets, cfg, rows, state, frozen, batch, rollout, scored, key)

  mesh = sharding.mesh_of(state_shardings)
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  options = ppo_step.compiler_options(nets, mesh)
  answers, frozen = (
    ppo_step.rollout_shardings(mesh),
    ppo_step.frozen_shardings(nets, cfg, state_shardings),
  )
  said = tree_of(
    Readings,
    behaviour_logprob_BR=split,
    ref_logprob_BR=split,
    value_BR=split if cfg.has_value_network else None,
    score_B=split,
    waste=whole,
    ensemble_B=split,
  )
  results = (state_shardings, whole, ppo_step.samples_shardings(mesh))
  compiled = lambda function, given, made, **kwargs: jax.jit(
    function, in_shardings=given, out_shardings=made, compiler_options=options, **kwargs
  )
  return SplitStep(
    sample=compiled(rollout, (state_shardings, frozen, split), answers),
    read=compiled(score, (state_shardings, frozen, answers), said),
    learn=compiled(
      learn, (state_shardings, frozen, split, answers, said, split), results, donate_argnums=0
    ),
    on_host=on_host,
    names=tuple(
      reward.name for reward in rewards.on_host(rewards.parse(cfg.rewards, "ppo.rewards"))
    ),
    mesh=mesh,
  )
