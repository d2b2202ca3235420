"""Every config builds and obeys its rules; mistakes get a telling message; no field is dead."""

import ast
import dataclasses
import itertools
import pathlib
import typing

import pytest

from configs import base, models
from instructjax.core import config as config_lib
from instructjax.core.config import from_config_dict
from instructjax.core.stages import STAGES, TARGETS
from instructjax.data import records
from instructjax.parallel import sharding
from tests.core.plain import changed, load

ROOT = pathlib.Path(__file__).parents[2]
PRESETS = (None, *models.PRESETS)
RULES_IN = ("config.py", "network.py", "training.py", "rl_training.py", "running.py")
BLOCKS = {
  cls.__name__: cls
  for cls in vars(config_lib).values()
  if isinstance(cls, type) and dataclasses.is_dataclass(cls)
}


def test_a_reward_model_of_the_policys_network_starts_from_its_weights():
  equal = dict(reward_model=load().to_dict()["model"], model__weights="a")
  assert from_config_dict(changed(**equal)).reward_model.weights == "a"
  assert from_config_dict(changed(**equal, reward_model__weights="b")).reward_model.weights == "b"
  assert from_config_dict(changed(model__weights="a")).reward_model.weights == ""  # a larger one


# --- every config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", TARGETS)
def test_config_builds(stage, preset):
  config = from_config_dict(load(stage, preset))
  assert config.stage == stage
  assert config.preset == (preset or "tiny")


@pytest.mark.parametrize("stage", TARGETS)
def test_paper_values_without_a_preset_build(stage):
  assert from_config_dict(base.base(stage)).preset == "paper"


def test_one_config_file_a_stage():
  others = {"__init__", "base", "gpt3", "models", "released", "smollm2", "tiny", "weights"}
  files = {path.stem for path in (ROOT / "configs").glob("*.py")} - others
  assert files == set(TARGETS)


def test_details_15_33_paper_values():
  """Table 6, App. C: what the paper prints, as the base holds it."""
  config = from_config_dict(base.base("ppo_ptx"))
  assert (config.sft.num_epochs, config.sft.dropout, config.sft.optim.learning_rate) == (
    16,
    0.2,
    9.65e-6,
  )
  assert (config.ppo_init.num_epochs, config.ppo_init.pretrain_mix) == (2, 0.1)
  assert (config.rm.num_epochs, config.rm.batch_size, config.rm.optim.learning_rate) == (
    1,
    64,
    9e-6,
  )
  ppo = config.ppo
  assert (ppo.batch_size * ppo.num_iterations, ppo.batch_size // ppo.num_minibatches) == (
    256_000,
    64,
  )
  assert (ppo.num_epochs, ppo.beta, ppo.gamma, ppo.clip, ppo.ema_decay) == (
    1,
    0.02,
    27.8,
    0.2,
    0.992,
  )
  assert (ppo.discount, ppo.temperature, ppo.ptx_rows, ppo.value_optim.learning_rate) == (
    1.0,
    1.0,
    8,
    9e-6,
  )


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_do_not_share_blocks(preset):
  """Blocks made once at import would leak one config's changes into the next."""
  first, second = load("ppo_ptx", preset), load("ppo_ptx", preset)
  first.ppo.policy_optim.learning_rate = 1.0
  first.model.num_layers = 77
  assert second.ppo.policy_optim.learning_rate != 1.0
  assert second.model.num_layers != 77


def test_unknown_preset():
  with pytest.raises(ValueError, match="preset 'tinny' must be one of .*tiny"):
    load("ppo_ptx", "tinny")


# --- mistakes -------------------------------------------------------------------------------------


_RULES = [
  *(
    (dict([(f"{block}__{name}", 0)]), f"config.{block}.{name}=0 must be positive")
    for block in ("model", "reward_model")
    for name in (
      "num_layers",
      "d_model",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "d_mlp",
      "max_length",
    )
  ),
  (
    dict(model__num_heads=4, model__num_kv_heads=3),
    "config.model.num_heads=4 must be a multiple of num_kv_heads=3",
  ),
  (dict(model__position="rope", model__head_dim=7), "config.model.head_dim=7 must be even"),
  (dict(adapter__rank=-1), "config.adapter.rank=-1 must be >= 0"),
  (dict(adapter__dropout=1.0), "config.adapter.dropout=1.0 must be in [0, 1)"),
  (dict(adapter__alpha=0.0), "config.adapter.alpha=0.0 must be positive"),
  (
    dict(adapter__targets=("q", "w")),
    "config.adapter.targets=('q', 'w') must hold some of q, k, v, out, gate, up, down, each once",
  ),
  (
    dict(adapter__rank=2, adapter__targets=("q", "v"), model__norm="layernorm"),
    "config.adapter.targets=('q', 'v') must have all of q, k, v or none: files of networks like"
    " config.model hold them as one matrix",
  ),
  (
    dict(adapter__rank=2, adapter__targets=("gate",), model__mlp="gelu_exact"),
    "config.adapter.targets=('gate',) must name a matrix of config.model, whose MLP has no gate",
  ),
  (
    dict(model__rope_scaling__factor=0.5),
    "config.model.rope_scaling.factor=0.5 must be >= 1",
  ),
  (
    dict(model__rope_scaling__low_freq_factor=4.0),
    "config.model.rope_scaling.low_freq_factor=4.0 must be > 0 and below high_freq_factor=4.0",
  ),
  (
    dict(model__rope_scaling__original_length=0),
    "config.model.rope_scaling.original_length=0 must be positive",
  ),
  (
    dict(model__rope_scaling__attention_factor=-1.0),
    "config.model.rope_scaling.attention_factor=-1.0 must be >= 0",
  ),
  (
    dict(model__rope_scaling__kind="yarn", model__position="rope", model__rope_base=1.0),
    "config.model.rope_base=1.0 must be above 1 for rope_scaling.kind='yarn'",
  ),
  (
    dict(model__position="learned", model__rope_scaling__kind="linear"),
    "config.model.rope_scaling.kind='linear' must be 'none' for learned positions",
  ),
  (dict(model__attention_window=-1), "config.model.attention_window=-1 must be >= 0"),
  (dict(model__rope_local_base=-1.0), "config.model.rope_local_base=-1.0 must be >= 0"),
  (dict(model__layer_pattern="GX"), "config.model.layer_pattern='GX' must be letters G, L or N"),
  (
    dict(model__norm="layernorm", model__qk_norm=True),
    "config.model.qk_norm=True must come with norm='rmsnorm' or 'rmsnorm_1p', got 'layernorm'",
  ),
  (
    dict(model__parallel_residual=True, model__sandwich_norm=True),
    "config.model.parallel_residual=True and sandwich_norm=True exclude each other",
  ),
  (
    dict(model__rotary_dim=50),
    "config.model.rotary_dim=50 must be even and at most head_dim=48",
  ),
  (
    dict(model__position="learned", model__rotary_dim=8),
    "config.model.rotary_dim=8 must be 0 for learned positions",
  ),
  (
    dict(model__position="learned", model__layer_pattern="GN"),
    "config.model.layer_pattern='GN' must have no N for learned positions",
  ),
  (dict(sft__optim__learning_rate=0), "config.sft.optim.learning_rate=0.0 must be > 0"),
  (dict(sft__optim__b1=1), "config.sft.optim.b1=1.0"),
  (dict(sft__optim__b2=-0.1), "b2=-0.1 must be in [0, 1)"),
  (dict(rm__optim__eps=0), "config.rm.optim.eps=0.0 must be > 0"),
  (dict(rm__optim__warmup_steps=-1), "config.rm.optim.warmup_steps=-1 must be >= 0"),
  (dict(rm__optim__warmup_start=2), "config.rm.optim.warmup_start=2.0 must be in [0, 1]"),
  (dict(rm__optim__end_fraction=-1), "config.rm.optim.end_fraction=-1.0 must be in [0, 1]"),
  (
    dict(ppo__value_optim__weight_decay=-1),
    "config.ppo.value_optim.weight_decay=-1.0 must be >= 0",
  ),
  (
    dict(ppo__policy_optim__clip_norm=0),
    "config.ppo.policy_optim.clip_norm=0.0 must be None or > 0",
  ),
  (dict(data__validation_fraction=0), "config.data.validation_fraction=0.0 must be in (0, 1)"),
  (dict(data__validation_fraction=1), "config.data.validation_fraction=1.0 must be in (0, 1)"),
  (dict(data__max_prompt_length=0), "config.data.max_prompt_length=0 must be positive"),
  (dict(data__max_response_length=0), "config.data.max_response_length=0 must be positive"),
  (dict(checkpoint__every_steps=0), "config.checkpoint.every_steps=0 must be positive"),
  (dict(checkpoint__keep=0), "config.checkpoint.keep=0 must be positive"),
  (dict(sft__dropout=1), "config.sft.dropout=1.0 must be in [0, 1)"),
  (dict(ppo_init__pretrain_mix=1), "config.ppo_init.pretrain_mix=1.0 must be in [0, 1)"),
  (dict(sft__pretrain_mix=0.01), "config.sft.pretrain_mix=0.01 must give both kinds of text a row"),
  (dict(rm__max_responses=1), "config.rm.max_responses=1 must be >= 2"),
  (dict(rm__cross_validation_folds=1), "config.rm.cross_validation_folds=1 must be 0 or >= 2"),
  (
    dict(ppo__batch_size=10, ppo__num_minibatches=4),
    "config.ppo.batch_size=10 must be divisible by num_minibatches=4",
  ),
  (dict(ppo__samples_per_prompt=3), "config.ppo.samples_per_prompt=3 must divide batch_size=128"),
  (
    dict(ppo__advantage="rloo"),
    "config.ppo.samples_per_prompt=1 must be at least 2 with advantage='rloo', which compares the answers to a prompt",
  ),
  (
    dict(ppo__advantage="grpo", ppo__samples_per_prompt=4, ppo__discount=0.9),
    "config.ppo.discount=0.9 must be 1 with advantage='grpo'",
  ),
  (
    dict(ppo__advantage="rloo", ppo__samples_per_prompt=4, ppo__whiten_rewards=True),
    "config.ppo.whiten_rewards=True must be False with advantage='rloo'",
  ),
  (
    dict(ppo__advantage="rloo", ppo__samples_per_prompt=4, ppo__value_warmup=2),
    "config.ppo.value_warmup=2 and value_init='reward_model' must be 0 and 'reward_model' with advantage='rloo', which"
    " has no value network",
  ),
  (
    dict(ppo__advantage="grpo", ppo__samples_per_prompt=4, ppo__kl_controller="adaptive"),
    "config.ppo.kl_controller='adaptive' must be 'fixed' with advantage='grpo', whose loss holds the KL",
  ),
  (
    dict(best_of_n__policy="few_shot"),
    "config.best_of_n.policy='few_shot' must be one of base, sft, ppo_init, ppo, ppo_ptx, ppo_ptx_2, ppo_ptx_3,"
    " rloo, grpo, ppo_beta0",
  ),
  (dict(evaluate__checkpoints=-1), "config.evaluate.checkpoints=-1 must be >= 0; 0 is none"),
  (dict(best_of_n__n=1), "config.best_of_n.n=1 must be from 2 to 4096"),
  (dict(best_of_n__num_prompts=-1), "config.best_of_n.num_prompts=-1 must be >= 0; 0 is all"),
  (dict(best_of_n__temperature=0), "config.best_of_n.temperature=0.0 must be at least 0.001"),
  (dict(pretrain__microbatches=0), "config.pretrain.microbatches=0 must be positive"),
  (dict(pretrain__microbatches=3), "config.pretrain.microbatches=3 must divide batch_size=16"),
  (dict(sft__microbatches=5), "config.sft.microbatches=5 must divide batch_size=16"),
  (dict(rm__microbatches=3), "config.rm.microbatches=3 must divide batch_size=8"),
  (
    dict(ppo__microbatches=3),
    "config.ppo.microbatches=3 must divide batch_size / num_minibatches=64",
  ),
  (
    dict(ppo__score_microbatches=3),
    "config.ppo.score_microbatches=3 must divide batch_size=128",
  ),
  (
    dict(ppo__score_microbatches=2, ppo__packed_rows=4),
    "config.ppo.score_microbatches=2 must be 1 with packed_rows=4, which are the rows computed at a time",
  ),
  (dict(ppo__ptx_microbatches=0), "config.ppo.ptx_microbatches=0 must be positive"),
  (
    dict(ppo__ptx_microbatches=7),
    "config.ppo.ptx_microbatches=7 must divide the 64 pretraining rows of a minibatch",
  ),
  (dict(ppo__temperature=0), "config.ppo.temperature=0.0 must be at least 0.001"),
  (dict(ppo__beta=-1), "config.ppo.beta=-1.0 must be >= 0"),
  (dict(ppo__gamma=-1), "config.ppo.gamma=-1.0 must be >= 0"),
  (dict(ppo__ema_decay=1), "config.ppo.ema_decay=1.0 must be in [0, 1)"),
  (
    dict(ppo__kl_controller="adaptive", ppo__kl_target=0),
    "config.ppo.kl_target=0.0 and kl_horizon=",
  ),
  (dict(stage="dpo"), "config.stage='dpo' must be one of pretrain, sft"),
  (dict(data__max_prompt_length=100_000), "must not exceed config.model.max_length="),
  (
    dict(model__max_length=100_000, data__max_prompt_length=50_000),
    "must not exceed config.reward_model.max_length=",
  ),
  (dict(sft__length=16), "must not exceed config.sft.length=16: a demonstration fits in one row"),
  (dict(ppo_init__length=16), "must not exceed config.ppo_init.length=16"),
  (dict(pretrain__evaluate_every=0), "config.pretrain.evaluate_every=0 must be positive"),
  (dict(pretrain__length=9999), "config.pretrain.length=9999 must not exceed config.model.max_"),
  (dict(ppo__ptx_length=9999), "config.ppo.ptx_length=9999 must not exceed config.model.max_"),
  (dict(log__every_steps=0), "config.log.every_steps=0 must be positive"),
  (dict(reward_pretrain__num_steps=0), "config.reward_pretrain.num_steps=0 must be positive"),
  (
    dict(ppo__packed_rows=3),
    "config.ppo.packed_rows=3 must be 0 or divide batch_size / num_minibatches=64",
  ),
  (dict(sft__num_epochs=0), "config.sft.num_epochs=0 must be positive"),
  (dict(collect__num_prompts=0), "config.collect.num_prompts=0 must be positive"),
  (dict(collect__wanted=0), "config.collect.wanted=0 must be positive"),
  (dict(collect__rounds=0), "config.collect.rounds=0 must be from 1 to 3"),
  (
    dict(collect__rounds=2, data__comparisons="jsonl:a"),
    "config.collect.rounds=2 must be 1 beside data.comparisons='jsonl:a': only simulated labelers, as of demo:",
  ),
  (dict(collect__min_responses=1), "config.collect.min_responses=1 must be from 2 to max"),
  (dict(rm__batch_size=0), "config.rm.batch_size=0 must be positive"),
  (dict(rm__row_length=31), "config.rm.row_length=31 must be 0 or at least data.max_prompt_length"),
  (dict(rm__row_length=-1), "config.rm.row_length=-1 must be 0 or at least data.max_prompt_length"),
  (
    dict(
      ppo__share_prompts=True,
      ppo__packed_rows=1,
      ppo__samples_per_prompt=4,
      ppo__batch_size=8,
      ppo__num_minibatches=4,
    ),
    "config.ppo.share_prompts needs whole groups of samples_per_prompt=4 answers in each of the num_minibatches=4",
  ),
  (
    dict(rm__share_prompts=True, rm__row_length=0),
    "config.rm.share_prompts needs config.rm.row_length > 0",
  ),
  (dict(rm__start_from="sft"), "config.rm.start_from='sft' must have reward_model equal to model"),
  (
    dict(reward_model=load().to_dict()["model"], rm__start_from="sft", rm__weights="x"),
    "config.rm.weights='x' is a finished reward model, so that nothing would start from rm.start_from='sft'",
  ),
  (
    dict(ppo__value_init="policy"),
    "config.ppo.value_init='policy' must have reward_model equal to model, and they differ",
  ),
  (
    dict(ppo__value_warmup=500, ppo__num_iterations=500),
    "config.ppo.value_warmup=500 must be >= 0 and below num_iterations=500",
  ),
  (
    dict(ppo__value_warmup=10, ppo__num_iterations=50, evaluate__overoptimization_iterations=10),
    "config.ppo.value_warmup=10 must be below evaluate.overoptimization_iterations=10",
  ),
  (
    dict(rm__weights="x", reward_model__weights="y"),
    "config.rm.weights='x' must come without config.reward_model.weights='y', from which nothing would start",
  ),
  (
    dict(reward_model=load().to_dict()["model"], rm__start_from="sft", reward_model__weights="x"),
    "config.rm.start_from='sft' must come without config.reward_model.weights='x'",
  ),
  (dict(collect__max_responses=99), "config.collect.max_responses=99 must not exceed rm.max"),
  (dict(ppo__num_minibatches=0), "config.ppo.num_minibatches=0 must be positive"),
  (dict(ppo__clip=0), "config.ppo.clip=0.0 must be > 0"),
  (dict(ppo__value_clip=0), "config.ppo.value_clip=0.0 must be None or > 0"),
  (dict(rollout__slots=-1), "config.rollout.slots=-1 must be >= 0; 0 is the whole batch"),
  (dict(rollout__slots=9999), "config.rollout.slots=9999 must not exceed ppo.batch_size="),
  (dict(evaluate__bootstrap=0), "config.evaluate.bootstrap=0 must be positive"),
  (
    dict(ppo__whiten_rewards=True, ppo__batch_size=8, ppo__num_minibatches=2),  # details 26
    "config.ppo.whiten_rewards=True must have batch_size / num_minibatches >= 8, got 4",
  ),
  (dict(ppo__gae_lambda=7), "config.ppo.gae_lambda=7.0 must be in [0, 1]"),
  (dict(ppo__discount=-1), "config.ppo.discount=-1.0 must be in [0, 1]"),
  (dict(ppo__ensemble=("a",)), "must come together: name further reward models in ensemble"),
  (dict(ppo__rewards=("ensemble:mean",)), "must come together: name further reward models"),
  (
    dict(ppo__rewards=("ensemble:mean",), ppo__ensemble=("a", "a")),
    "config.ppo.ensemble=('a', 'a') must not name a reward model twice",
  ),
  (dict(ppo__ensemble_penalty=-1), "config.ppo.ensemble_penalty=-1.0 must be >= 0"),
  (dict(ppo__constant_iterations=-1), "constant_iterations=-1 must be >= 0; 0 never stops"),
  (dict(ppo__max_kl=-1), "config.ppo.max_kl=-1.0 must be >= 0"),
  (dict(rm__cross_validation_folds=-3), "config.rm.cross_validation_folds=-3 must be 0 or >= 2"),
  (dict(rm__cross_validation_prompts=0), "config.rm.cross_validation_prompts=0 must be positive"),
  (dict(collect__temperature=-1), "config.collect.temperature=-1.0 must be at least"),
  (dict(evaluate__temperature=0), "config.evaluate.temperature=0.0 must be at least"),
  (dict(seed=-1), "config.seed=-1 must be >= 0"),
  (dict(seed=2**63), "config.seed=9223372036854775808 must be >= 0 and below 2**63"),
  (dict(evaluate__group_size=1), "config.evaluate.group_size=1 must be at least 2"),
  (
    dict(evaluate__compare=("rloo",), evaluate__group_size=3),
    "config.evaluate.group_size=3 must divide ppo.batch_size=",
  ),
  (
    dict(
      evaluate__compare=("rloo",),
      evaluate__group_size=4,
      ppo__share_prompts=True,
      ppo__batch_size=16,
      ppo__num_minibatches=8,
    ),
    "config.evaluate.group_size=4 must divide a minibatch's 2 answers of rloo with ppo.share_prompts",
  ),
  (dict(stage="grpo", evaluate__group_size=3), "the answers of an iteration of grpo"),
  (dict(evaluate__compare=("sft",)), "must hold only 'ppo', 'ppo_ptx', 'rloo', 'grpo'"),
  (dict(log__samples=-1), "config.log.samples=-1 must be >= 0"),
  (
    dict(log__trackers=("wandb", "comet")),
    "config.log.trackers=('wandb', 'comet') must be some of tensorboard, wandb, mlflow",
  ),
  (
    dict(log__trackers=("wandb", "wandb")),
    "config.log.trackers=('wandb', 'wandb') must not name one twice",
  ),
  (
    dict(log__project="two\nlines"),
    "config.log.project='two\\nlines' must be at most 128 printable characters",
  ),
  (dict(log__run_name="x" * 129), "config.log.run_name='xxx"),
  (dict(tokenizer__vocab_size=0), "config.tokenizer.vocab_size=0 must be positive"),
  (dict(sft__num_epochs=10**9), "config.sft.num_epochs=1000000000 must be at most 100000"),
  (dict(collect__num_prompts=10**9), "config.collect.num_prompts=1000000000 times max_responses="),
  (
    dict(evaluate__num_prompts=256, evaluate__samples_per_prompt=1024),
    "config.evaluate.samples_per_prompt=1024 for config.evaluate.num_prompts=256 must be so few",
  ),
  (dict(evaluate__samples_per_prompt=10**9), "samples_per_prompt=1000000000 must be at most 2**24"),
  (dict(evaluate__bootstrap=10**9), "config.evaluate.bootstrap=1000000000 times num_prompts="),
  (dict(ppo__num_iterations=2**30), "must be below 2**31: the schedule counts updates in 32 bits"),
  (dict(guard__stuck_factor=1), "config.guard.stuck_factor=1.0 must be 0 or > 1"),
  (dict(guard__grace_seconds=0), "config.guard.grace_seconds=0.0 must be positive"),
  (dict(model__init_std=-1), "config.model.init_std=-1.0 must be >= 0"),
  (dict(model__norm_eps=0), "config.model.norm_eps=0.0 must be positive"),
  (dict(model__rope_base=0), "config.model.rope_base=0.0 must be positive"),
  *(
    (dict(profile__steps=steps), f"config.profile.steps='{steps}' must be '' or 'A:B'")
    for steps in ("1:3", "3:3", "5", "a:b", "3:5:7")
  ),
]


@pytest.mark.parametrize("values, message", _RULES)
def test_rule(values, message):
  with pytest.raises(ValueError) as error:
    from_config_dict(changed(**values))
  assert message in str(error.value)


def of_type(kind: type) -> list[str]:
  """Dotted names of all fields whose values are of this type, or are None."""

  def walk(cls, where):
    for name, hint in typing.get_type_hints(cls).items():
      if dataclasses.is_dataclass(hint):
        yield from walk(hint, f"{where}{name}.")
      elif hint is kind or kind in typing.get_args(hint):
        yield where + name

  return list(walk(config_lib.Config, ""))


def refusal(values: dict) -> str:
  """What a config with this one change, dotted name -> value, is told; '' if it is taken."""
  return _message({name.replace(".", "__"): value for name, value in values.items()})


def test_every_number_is_finite_and_one_of_float32():
  floats = of_type(float)
  assert {"model.rope_base", "model.norm_eps", "ppo.missing_eos_score", "ppo.kl_target"} <= {
    *floats
  }
  for name in floats:
    for value in (float("inf"), float("-inf"), float("nan")):
      assert refusal({name: value}) == f"config.{name}={value} must be a finite number"
    for value in (1e39, -1e39, 1e-40, 10**400):
      assert f"config.{name}=" in (told := refusal({name: value})) and "of float32" in told
    for value in (True, "1.0", [1.0]):
      assert f"config.{name}={value!r} must be of type float" in refusal({name: value})


def test_every_whole_number_fits_in_32_bits_and_is_no_bool():
  for name in of_type(int):
    if name != "seed":
      for value in (2**31, -(2**31) - 1, 2**63, 10**5000):
        told = refusal({name: value})
        assert "must be a whole number of 32 bits" in told and len(told) < 250
    for value in (True, 1.0, "1", None):
      assert f"config.{name}={value!r} must be of type int" in refusal({name: value})


def test_a_value_is_quoted_in_part_and_without_control_characters():
  told = refusal({"stage": "x" * 10_000})
  assert len(told) < 400
  assert refusal({"execution.dtype": "a\x1b[31m\n"}).isprintable()


def test_every_rule_has_a_case():
  """Each rule is one `require` call in a validate(); none may be added without a case above."""
  trees = [ast.parse((ROOT / "instructjax/core" / name).read_text()) for name in RULES_IN]
  methods = [
    node
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and node.name == "validate"
  ]
  rules = [
    call.args[1]
    for method in methods
    for call in ast.walk(method)
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "require"
  ]
  assert rules
  reached = [_message(values) for values, _ in _RULES]
  for rule in rules:
    pieces = [part.value for part in rule.values if isinstance(part, ast.Constant)]
    telling = max(pieces, key=len)  # the message's longest fixed piece
    assert any(telling in message for message in reached), (
      f"line {rule.lineno}: no case breaks this rule"
    )


def _message(values: dict) -> str:
  try:
    from_config_dict(changed(**values))
  except ValueError as error:
    return str(error)
  return ""


# --- dataclasses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", BLOCKS.values(), ids=BLOCKS)
def test_frozen_and_without_defaults(cls):
  """Nothing below main changes a setting, and configs/base.py holds every value."""
  assert cls.__dataclass_params__.frozen
  for field in dataclasses.fields(cls):
    assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, (
      field.name
    )


def test_config_is_hashable():
  """Static arguments of compiled functions hold parts of it."""
  assert hash(from_config_dict(load())) == hash(from_config_dict(load()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    from_config_dict(load()).ppo.beta = 1.0


# --- no dead fields -------------------------------------------------------------------------------

# Read by getattr(block, name) with a computed name, which the walk below cannot see.
_READ_BY_NAME = {
  *(("MeshConfig", axis) for axis in sharding.MESH_AXES),
  *(("DataConfig", kind) for kind in records.KINDS),
  *(("Config", row.block) for row in STAGES.values()),
  *(
    ("EvaluateConfig", name.split(".")[1])
    for row in STAGES.values()
    for name in (*row.takes.values(), row.asked_by)
    if name
  ),
  *((cls, "weights") for cls in ("SFTConfig", "RMConfig")),  # by `Stage.given_by`
}


class _Reads(ast.NodeVisitor):
  """Attribute reads of one file, each with the config class it is read from, where that shows.

  It shows in annotations (arguments, assignments, fields of dataclasses, return values) and in what
  a name was assigned, as in `cfg, data = ctx.config.rm, ctx.config.data`.
  """

  def __init__(self, known: dict[str, str]):
    self.known = known  # attribute or function name -> config class, over the whole package
    self.scopes = [{}]
    self.reads = set()  # (class or None, field)

  def visit_FunctionDef(self, node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    self.scopes.append({a.arg: _class_named(a.annotation) for a in arguments})
    self.generic_visit(node)
    self.scopes.pop()

  def visit_ClassDef(self, node):
    self.scopes.append({})
    self.generic_visit(node)
    self.scopes.pop()

  def visit_AnnAssign(self, node):
    self.generic_visit(node)
    if isinstance(node.target, ast.Name):
      self.scopes[-1][node.target.id] = _class_named(node.annotation)

  def visit_Assign(self, node):
    self.generic_visit(node)
    for target in node.targets:
      pairs = [(target, node.value)]
      if isinstance(target, ast.Tuple):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else []
        pairs = itertools.zip_longest(target.elts, values[: len(target.elts)])
      for name, value in pairs:
        if isinstance(name, ast.Name):
          self.scopes[-1][name.id] = self.type_of(value)

  def visit_Attribute(self, node):
    self.generic_visit(node)
    if isinstance(node.ctx, ast.Load):
      self.reads.add((self.type_of(node.value), node.attr))

  def type_of(self, node) -> str | None:
    if isinstance(node, ast.Name):
      return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
    if isinstance(node, ast.Attribute):
      owner = self.type_of(node.value)
      hint = typing.get_type_hints(BLOCKS[owner]).get(node.attr) if owner else None
      return _name_of(hint) if owner else self.known.get(node.attr)
    if isinstance(node, ast.IfExp):
      return self.type_of(node.body)
    if isinstance(node, ast.Call):
      name = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
      )
      return self.type_of(node.args[0]) if name == "replace" and node.args else self.known.get(name)
    return None


def _class_named(annotation) -> str | None:
  return annotation.id if isinstance(annotation, ast.Name) and annotation.id in BLOCKS else None


def _name_of(hint) -> str | None:
  return hint.__name__ if isinstance(hint, type) and hint.__name__ in BLOCKS else None


def dead_fields(trees: list[ast.Module]) -> set[str]:
  """Fields that no code reads. One whose name no other block has counts as read from anything."""
  known = {}
  for node in walk_all(trees):
    if isinstance(node, ast.ClassDef):
      fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
      known |= {
        f.target.id: _class_named(f.annotation) for f in fields if _class_named(f.annotation)
      }
    elif isinstance(node, ast.FunctionDef) and _class_named(node.returns):
      known[node.name] = _class_named(node.returns)
  reads = set()
  for tree in trees:
    visitor = _Reads(known)
    visitor.visit(tree)
    reads |= visitor.reads
  fields = [(name, field) for name, cls in BLOCKS.items() for field in vars(cls)["__annotations__"]]
  names = [field for _, field in fields]
  return {
    f"{cls}.{field}"
    for cls, field in fields
    if (cls, field) not in reads | _READ_BY_NAME
    and not (names.count(field) == 1 and (None, field) in reads)
  }


def walk_all(trees):
  for tree in trees:
    yield from ast.walk(tree)


def package_trees() -> list[ast.Module]:
  """The package without the configs: a field that only its own validate() reads is dead too."""
  configs = {ROOT / "instructjax/core" / f"{name}.py" for name in ("config", "network", "training")}
  paths = [p for p in sorted((ROOT / "instructjax").rglob("*.py")) if p not in configs]
  return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def test_no_dead_fields():
  assert dead_fields(package_trees()) == set(), (
    "nothing reads these: use them or delete them, here and in configs/"
  )


@pytest.mark.parametrize(
  "code, read",
  [
    ("def f(cfg: EvaluateConfig): return cfg.weights", "EvaluateConfig.weights"),
    (
      "def f(ctx):\n  cfg, n = ctx.config.evaluate, 1\n  return lambda: cfg.weights",
      "EvaluateConfig.weights",
    ),
    (
      "class Context:\n  config: Config\ndef f(ctx): return ctx.config.evaluate.weights",
      "EvaluateConfig.weights",
    ),
    ("def f(a, b: EvaluateConfig): return (b if a else None).weights", "EvaluateConfig.weights"),
    ("def f(labeler): return labeler.weights", None),
    ("def f(x): return x.gae_lambda", "PPOConfig.gae_lambda"),
  ],
)
def test_what_counts_as_read(code, read):
  alive = dead_fields([ast.parse("class Context:\n  config: Config")]) - dead_fields(
    [ast.parse("class Context:\n  config: Config"), ast.parse(code)]
  )
  assert alive - {"Config.evaluate"} == ({read} if read else set())
