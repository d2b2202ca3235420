"""The table of stages. It holds everything that code outside a stage's own module needs to know about the stage.

The config, the pipeline, the weights, the report, the model card and launch/ read it. `stages/lineage.py` works out
what depends on the config as well, such as the order of a run and the parents of a stage. Pure data, no JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from instructjax.core import results

Head = Literal["lm", "scalar"]  # what a network ends in
RoleName = Literal["policy", "reward", "reward_base"]
Kind = Literal["base", "sft", "collect", "rm", "select", "rl", "best_of_n", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Role:
  """A use that a run has for a network.

  Attributes:
    block: the config block with its architecture.
    head: its output, which is a language model's logits (lm) or a single score (scalar).
  """

  block: Literal["model", "reward_model"]
  head: Head


ROLES: dict[RoleName, Role] = {
  "policy": Role("model", "lm"),  # the KL reference has this role too
  "reward": Role("reward_model", "scalar"),  # the value network has this role too
  "reward_base": Role("reward_model", "lm"),
}


@dataclasses.dataclass(frozen=True)
class Policy:
  """How the evaluation and the report name and draw a policy.

  Attributes:
    name: its name in results and file names.
    title: its name in tables and figures.
    colour: its colour in figures.
  """

  name: str
  title: str
  colour: str


@dataclasses.dataclass(frozen=True)
class Stage:
  """One row of the table.

  Attributes:
    name: name of the stage and of its folder in the workdir.
    module: module in `instructjax.stages` that implements it: `run(ctx, stage)`, and where they are needed
      `check(ctx, stage)` and `check_settings(config, stage)`.
    kind: what it does. A base starts from nothing; `select` chooses the
      step of another stage; `rl` is PPO or one of its kin, which averages the policy's weights and, if it is PPO, also
      trains a value network.
    parents: stages whose weights or files this one may start from; all of them are above it in the table. The config
      may decide which of them it does start from: see `lineage.parents`.
    reads: kinds of records that it reads.
    block: config block with its settings.
    result: type of its measurements, from core/results.py.
    given_by: dotted config field that may name weights in place of what the stage trains; None if there is none. A base
      or an `sft` stage is then left out, and `rm` only measures the given reward model.
    batches: dotted config fields whose number of rows must be divisible over the mesh. A field that is 0 is unused.
    role: role of the network that it trains, a key of ROLES; None if it trains none.
    is_target: whether `config.stage` may name it. An RL stage that is no target runs for comparison only.
    asked_by: dotted config field, a bool, that adds this RL stage to a run; None if only its name does.
    keeps: the epoch of an `sft` stage whose weights later stages use; None for other kinds, which have no epochs to
      choose from. A base uses its step with the lowest held-out loss.
    selects: the stage whose step this one chooses anew, replacing the choice by `keeps`.
    holds: field of its block -> value that the stage always uses, whatever the config says.
    takes: field of its block -> dotted config field that supplies its value instead.
    policy: name and style of the policy that it trains; None if it trains no policy that is evaluated.
    round: round of comparisons that it belongs to. Those after the first run if `collect.rounds` asks for them.
    what, paper: what its weights are, and where the paper describes them. Used in a sentence of the model card.
  """

  name: str
  module: str
  kind: Kind
  parents: tuple[str, ...]
  reads: tuple[str, ...]
  block: str
  result: type
  given_by: str | None = None
  batches: tuple[str, ...] = ()
  role: RoleName | None = None
  is_target: bool = False
  asked_by: str | None = None
  keeps: Literal["best", "last"] | None = None
  selects: str | None = None
  holds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  policy: Policy | None = None
  round: int = 1
  what: str = ""
  paper: str = ""

  @property
  def is_base(self) -> bool:
    """Whether it trains a base."""
    return self.kind == "base"

  @property
  def is_rl(self) -> bool:
    """Whether it is PPO or one of its kin."""
    return self.kind == "rl"

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


# The policy that PPO starts from, and from which its KL is measured (C.3). Also the name of the stage that trains it.
REFERENCE = "ppo_init"

# The policy whose answers are ranked in later rounds (sec 3.1), and most rounds that a run may have.
RANKED, MAX_ROUNDS = "ppo_ptx", 3


def of_round(stage: str, number: int) -> str:
  """The name of a stage of round 1 in another round: rm_2 is that of the second."""
  return stage if number == 1 else f"{stage}_{number}"


_LATER = range(2, MAX_ROUNDS + 1)
_RL_NAMES = ("ppo", "ppo_ptx", *(of_round(RANKED, number) for number in _LATER))
_RL_NAMES += ("rloo", "grpo", "ppo_beta0")
_RL: dict[str, Any] = dict(
  module="ppo",
  kind="rl",
  parents=(REFERENCE, "rm"),
  reads=("prompts", "documents"),
  block="ppo",
  result=results.Nothing,
  # The last one is the batch of held-out text on which the pretraining loss is measured during RL.
  batches=("ppo.batch_size", "ppo.packed_rows", "rollout.slots", "pretrain.batch_size"),
  role="policy",
)

# RL without a value network: settings of one mean nothing. Answers to the same prompt are compared with each other.
_GROUPED: dict[str, Any] = dict(
  is_target=True,
  takes={"samples_per_prompt": "evaluate.group_size"},
  **_RL,
)
_NO_VALUES = {"gamma": 0.0, "value_init": "reward_model", "value_warmup": 0}

_COLLECT: dict[str, Any] = dict(
  module="collect",
  kind="collect",
  reads=("prompts",),
  block="collect",
  result=results.Collected,
)
_RM: dict[str, Any] = dict(
  module="rm",
  kind="rm",
  reads=("comparisons", "demonstrations"),
  block="rm",
  result=results.RewardModel,
  batches=("rm.batch_size",),
  role="reward",
)
_RM_STARTS = ("pretrain", "reward_pretrain", "sft")


def _round(number: int) -> tuple[Stage, ...]:
  """The stages of a later round: comparisons, a reward model trained on all so far, and a new policy (sec 3.1)."""
  collected = tuple(of_round("collect", earlier) for earlier in range(1, number + 1))
  policy = of_round(RANKED, number)
  return (
    Stage(name=collected[-1], parents=(of_round(RANKED, number - 1),), round=number, **_COLLECT),
    Stage(
      name=of_round("rm", number),
      parents=(*_RM_STARTS, *collected),
      round=number,
      what=f"a reward model, trained on the ranked answers of {number} rounds",
      paper="sec 3.1, 3.5, C.2",
      **_RM,
    ),
    Stage(
      name=policy,
      policy=Policy(policy, f"PPO-ptx, round {number}", ("#0e6b47", "#084a31")[number - 2]),
      round=number,
      what=f"a policy trained with PPO-ptx against the reward model of round {number}",
      paper="sec 3.1, eq. 2",
      **_RL | {"parents": (REFERENCE, of_round("rm", number))},
    ),
  )


_ROWS = (
  Stage(
    name="pretrain",
    module="pretrain",
    kind="base",
    parents=(),
    reads=("documents",),
    block="pretrain",
    result=results.Pretrained,
    given_by="model.weights",
    batches=("pretrain.batch_size",),
    role="policy",
    is_target=True,
    policy=Policy("base", "Base", "#a3abb5"),
    what="a base language model, trained on documents",
    paper="the base that stands in for GPT-3",
  ),
  Stage(
    name="reward_pretrain",
    module="pretrain",
    kind="base",
    parents=(),
    reads=("documents",),
    block="reward_pretrain",
    result=results.Pretrained,
    given_by="reward_model.weights",
    batches=("reward_pretrain.batch_size", "pretrain.batch_size"),
    role="reward_base",
    policy=Policy("reward_base", "Larger base", "#737d8a"),
    what="a base language model, trained on documents",
    paper="the base of the reward model, which stands in for GPT-3",
  ),
  Stage(
    name="sft",
    module="sft",
    kind="sft",
    parents=("pretrain",),
    reads=("demonstrations", "documents"),
    block="sft",
    result=results.Tuned,
    given_by="sft.weights",
    batches=("sft.batch_size", "pretrain.batch_size"),
    role="policy",
    is_target=True,
    keeps="best",
    policy=Policy("sft", "SFT", "#e3a008"),
    what="a supervised baseline, trained on demonstrations",
    paper="sec 3.5, C.1",
  ),
  Stage(name="collect", parents=("sft",), **_COLLECT),
  Stage(
    name="rm",
    parents=(*_RM_STARTS, "collect"),
    given_by="rm.weights",
    is_target=True,
    what="a reward model, trained on ranked answers",
    paper="eq. 1, sec 3.5, C.2",
    **_RM,
  ),
  Stage(
    name="sft_select",
    module="sft_select",
    kind="select",
    parents=("sft", "rm"),
    reads=("prompts",),
    block="evaluate",
    result=results.Selected,
    selects="sft",
  ),
  Stage(
    name=REFERENCE,
    module="sft",
    kind="sft",
    parents=("pretrain",),
    reads=("demonstrations", "documents"),
    block="ppo_init",
    result=results.Tuned,
    given_by="ppo_init.weights",
    batches=("ppo_init.batch_size", "pretrain.batch_size"),
    role="policy",
    is_target=True,
    keeps="last",
    policy=Policy(REFERENCE, "PPO init", "#bfa55a"),
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
  *(row for number in _LATER for row in _round(number)),
  Stage(
    name="rloo",
    holds={"advantage": "rloo"} | _NO_VALUES,
    policy=Policy("rloo", "RLOO", "#c2702e"),
    what="a policy trained with RLOO against a reward model",
    paper="not in the paper: Ahmadian et al. 2024",
    **_GROUPED,
  ),
  Stage(
    name="grpo",
    holds={"advantage": "grpo"} | _NO_VALUES,
    policy=Policy("grpo", "GRPO", "#2b9eb3"),
    what="a policy trained with GRPO against a reward model",
    paper="not in the paper: DeepSeekMath, Shao et al. 2024",
    **_GROUPED,
  ),
  Stage(
    name="ppo_beta0",
    asked_by="evaluate.overoptimization",
    # max_kl=0 is no limit. This stage exists to show over-optimisation, which a limit on the KL would stop.
    holds={"gamma": 0.0, "beta": 0.0, "kl_controller": "fixed", "max_kl": 0.0},
    takes={"num_iterations": "evaluate.overoptimization_iterations"},
    policy=Policy("ppo_beta0", "PPO, β = 0", "#d9485f"),
    what="a policy trained with PPO without a KL penalty, to show its need",
    paper="E.7",
    **_RL,
  ),
  Stage(
    name="best_of_n",
    module="best_of_n",
    kind="best_of_n",
    # The stage of the policy that answers, and the reward model: see `lineage.parents`.
    parents=("pretrain", "rm", "sft_select", REFERENCE, *_RL_NAMES),
    reads=("prompts",),
    block="best_of_n",
    result=results.Chosen,
    is_target=True,
  ),
  Stage(
    name="evaluate",
    module="evaluate",
    kind="evaluate",
    # Among the RL stages, only those that the config asks for count, and a given `sft` in place of `sft_select`: see
    # `lineage.parents`.
    parents=(
      *("sft", "rm", *(of_round("rm", number) for number in _LATER), "sft_select", REFERENCE),
      *_RL_NAMES,
    ),
    reads=("prompts", "documents", "demonstrations"),
    block="evaluate",
    result=results.Evaluated,
    batches=("pretrain.batch_size",),
    is_target=True,
  ),
)

STAGES = {row.name: row for row in _ROWS}  # in the order they run
TARGETS = tuple(row.name for row in _ROWS if row.is_target)
RL_STAGES = tuple(row.name for row in _ROWS if row.is_rl)

# The larger base model with worked examples in its prompt, like the paper's prompted GPT-3. It is evaluated, but no
# stage trains it.
FEW_SHOT = Policy("few_shot", "Larger base, few-shot", "#9a7b6c")
POLICIES = {row.policy.name: row.policy for row in _ROWS if row.policy} | {FEW_SHOT.name: FEW_SHOT}
# Answers that need no training, beside which the evaluation puts every policy's.
UNTRAINED = {
  one.name: one
  for one in (
    Policy("echo", "Echo of the prompt", "#8a8f98"),
    Policy("best_line", "One training line for all", "#6f7680"),
    Policy("random_line", "A random training line", "#a9afb7"),
    Policy("demonstrations", "Test demonstrations", "#565c64"),
  )
}


# The policies that have the policy's network, and whose answers `best_of_n` can choose from.
SPEAKERS = tuple(
  row.policy.name for row in _ROWS if row.policy is not None and row.role == "policy"
)


def selector(stage: str) -> str | None:
  """The stage that chooses the step of `stage` anew, or None if there is none."""
  return next((row.name for row in _ROWS if row.selects == stage), None)


def stage_of_kind(kind: Kind) -> Stage:
  """The stage of a kind that the table has once in a round: that of the first."""
  (row,) = (row for row in _ROWS if row.kind == kind and row.round == 1)
  return row


def stage_of_policy(policy: str) -> Stage:
  """The stage that trains the policy of this name, which must have one."""
  return next(row for row in _ROWS if row.policy and row.policy.name == policy)
