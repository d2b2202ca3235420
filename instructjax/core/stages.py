"""The table of stages: all that anybody but the stage's own module has to know of it. Pure data, no JAX.

Read by the config, the pipeline, weights, the report, the model card and launch/. What a config makes of the table (a
plan, the parents of a stage) is `stages/lineage.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from instructjax.core import results

Head = Literal["lm", "scalar"]  # what a network ends in
RoleName = Literal["policy", "reward", "reward_base"]


@dataclasses.dataclass(frozen=True)
class Role:
  """What a network is for.

  Attributes:
    block: config block of its architecture.
    head: what it ends in: a language model's logits, or one score.
  """

  block: Literal["model", "reward_model"]
  head: Head


ROLES: dict[RoleName, Role] = {
  "policy": Role("model", "lm"),  # also the reference
  "reward": Role("reward_model", "scalar"),  # also the value network
  "reward_base": Role("reward_model", "lm"),
}


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy as evaluation and report call it.

  Attributes:
    name: in results and files.
    title: in tables and figures.
    colour: in figures.
  """

  name: str
  title: str
  colour: str


@dataclasses.dataclass(frozen=True)
class Stage:
  """A row of the table.

  Attributes:
    name: of the stage and of its folder in the workdir.
    module: of `instructjax.stages`; it has `run(ctx, stage)` and `check(ctx, stage)`.
    parents: stages whose weights or files this one may start from, all of them above it in the table. Which of them
      it does start from may depend on the config: see `lineage.parents`.
    reads: kinds of records.
    block: config block of its own settings.
    result: type of what it measures, in core/results.py.
    batches: dotted config fields whose rows the mesh must divide; 0 is a batch that is not used.
    role: of the network that it trains, a key of ROLES; None where it trains none.
    is_rl: whether it is PPO: it trains a value network as well, and keeps an average of the policy's weights.
    is_target: whether `config.stage` may name it. An RL stage that it may not name runs for comparison only.
    keeps: which of its steps later stages start from.
    selects: stage of which this one chooses the step, in place of the one that it kept.
    holds: fields of its block that it sets, whatever the config says.
    takes: fields of its block -> dotted config field that they are taken from.
    policy: what it trains, as evaluation calls it; None for what is not judged.
    what, paper: in a sentence about its weights: what they are, and where the paper has them.
  """

  name: str
  module: str
  parents: tuple[str, ...]
  reads: tuple[str, ...]
  block: str
  result: type
  batches: tuple[str, ...] = ()
  role: RoleName | None = None
  is_rl: bool = False
  is_target: bool = False
  keeps: Literal["best", "last"] = "last"
  selects: str | None = None
  holds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  policy: Policy | None = None
  what: str = ""
  paper: str = ""

  def require_role(self) -> RoleName:
    """The role of the network that it trains, for whoever knows that it trains one."""
    if self.role is None:
      raise ValueError(f"stage {self.name} trains no network")
    return self.role

  def require_policy(self) -> Policy:
    """The policy that it trains, for whoever knows that evaluation judges it."""
    if self.policy is None:
      raise ValueError(f"stage {self.name} trains no policy")
    return self.policy


_RL: dict[str, Any] = dict(
  module="ppo",
  parents=("ppo_init", "rm"),
  reads=("prompts", "documents"),
  block="ppo",
  result=results.Nothing,
  # The last is of held-out text, which is measured meanwhile.
  batches=("ppo.batch_size", "ppo.packed_rows", "rollout.slots", "pretrain.batch_size"),
  role="policy",
  is_rl=True,
)

_ROWS = (
  Stage(
    name="pretrain",
    module="pretrain",
    parents=(),
    reads=("documents",),
    block="pretrain",
    result=results.Pretrained,
    batches=("pretrain.batch_size",),
    role="policy",
    is_target=True,
    keeps="best",
    policy=Policy("base", "Base", "#a3abb5"),
    what="a base language model, trained on documents",
    paper="the base that stands in for GPT-3",
  ),
  Stage(
    name="reward_pretrain",
    module="pretrain",
    parents=(),
    reads=("documents",),
    block="reward_pretrain",
    result=results.Pretrained,
    batches=("reward_pretrain.batch_size", "pretrain.batch_size"),
    role="reward_base",
    keeps="best",
    policy=Policy("reward_base", "Larger base", "#737d8a"),
    what="a base language model, trained on documents",
    paper="the base of the reward model, which stands in for GPT-3",
  ),
  Stage(
    name="sft",
    module="sft",
    parents=("pretrain",),
    reads=("demonstrations", "documents"),
    block="sft",
    result=results.Tuned,
    batches=("sft.batch_size", "pretrain.batch_size"),
    role="policy",
    is_target=True,
    keeps="best",
    policy=Policy("sft", "SFT", "#e3a008"),
    what="a supervised baseline, trained on demonstrations",
    paper="sec 3.5, C.1",
  ),
  Stage(
    name="collect",
    module="collect",
    parents=("sft",),
    reads=("prompts",),
    block="collect",
    result=results.Collected,
  ),
  Stage(
    name="rm",
    module="rm",
    parents=("pretrain", "reward_pretrain", "sft", "collect"),
    reads=("comparisons", "demonstrations"),
    block="rm",
    result=results.RewardModel,
    batches=("rm.batch_size",),
    role="reward",
    is_target=True,
    what="a reward model, trained on ranked answers",
    paper="eq. 1, sec 3.5, C.2",
  ),
  Stage(
    name="sft_select",
    module="sft_select",
    parents=("sft", "rm"),
    reads=("prompts",),
    block="evaluate",
    result=results.Selected,
    selects="sft",
  ),
  Stage(
    name="ppo_init",
    module="sft",
    parents=("pretrain",),
    reads=("demonstrations", "documents"),
    block="ppo_init",
    result=results.Tuned,
    batches=("ppo_init.batch_size", "pretrain.batch_size"),
    role="policy",
    is_target=True,
    policy=Policy("ppo_init", "PPO init", "#bfa55a"),
    what="a supervised model, trained on demonstrations mixed with pretraining text: PPO's start and KL reference",
    paper="C.3",
  ),
  Stage(
    name="ppo",
    is_target=True,
    holds={"gamma": 0.0},
    policy=Policy("ppo", "PPO", "#3b82d6"),
    what="a policy trained with PPO against a reward model",
    paper="sec 3.5, C.4, gamma = 0",
    **_RL,
  ),
  Stage(
    name="ppo_ptx",
    is_target=True,
    policy=Policy("ppo_ptx", "PPO-ptx", "#1f9d6b"),
    what="a policy trained with PPO-ptx against a reward model",
    paper="eq. 2, sec 3.5, C.4",
    **_RL,
  ),
  Stage(
    name="ppo_beta0",
    # Without a limit: letting the policy run away is the point.
    holds={"gamma": 0.0, "beta": 0.0, "kl_controller": "fixed", "max_kl": 0.0},
    takes={"num_iterations": "evaluate.overoptimization_iterations"},
    policy=Policy("ppo_beta0", "PPO, β = 0", "#d9485f"),
    what="a policy trained with PPO without a KL penalty, to show its need",
    paper="E.7",
    **_RL,
  ),
  Stage(
    name="evaluate",
    module="evaluate",
    # Of the RL stages, those that the config asks for.
    parents=("sft_select", "ppo_init", "ppo", "ppo_ptx", "ppo_beta0"),
    reads=("prompts", "documents"),
    block="evaluate",
    result=results.Evaluated,
    batches=("pretrain.batch_size",),
    is_target=True,
  ),
)

STAGES = {row.name: row for row in _ROWS}  # in the order they run
TARGETS = tuple(row.name for row in _ROWS if row.is_target)
RL_STAGES = tuple(row.name for row in _ROWS if row.is_rl)

# The larger base with worked examples in its prompt, as the paper gave GPT-3: judged, but no stage's.
FEW_SHOT = Policy("few_shot", "Larger base, few-shot", "#9a7b6c")
POLICIES = {row.policy.name: row.policy for row in _ROWS if row.policy} | {FEW_SHOT.name: FEW_SHOT}


def selector(stage: str) -> str | None:
  """The stage that chooses this one's step once more; None where nobody does."""
  return next((row.name for row in _ROWS if row.selects == stage), None)


def stage_of_policy(policy: str) -> Stage:
  """The stage that trains a policy."""
  return next(row for row in _ROWS if row.policy and row.policy.name == policy)
