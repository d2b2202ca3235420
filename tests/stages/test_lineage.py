"""What a config makes of the table of stages: plans, parents, variants of PPO."""

import dataclasses

import pytest

from instructjax.stages import lineage
from tests import micro

SPECS = {kind: "jsonl:x" for kind in ("documents", "demonstrations", "comparisons", "prompts")}
BIGGER = {"reward_model__d_mlp": 48}
LAST = ["sft_select", "ppo_init"]


def config(stage="ppo_ptx", **changes):
  return micro.config(stage, SPECS, **changes)


@pytest.mark.parametrize(
  ("stage", "changes", "expected"),
  [
    ("pretrain", {}, ["pretrain"]),
    ("sft", BIGGER, ["pretrain", "sft"]),
    ("ppo_init", {}, ["pretrain", "ppo_init"]),
    ("rm", {}, ["pretrain", "rm"]),  # of one's own comparisons, SFT has no part in it
    ("rm", {"rm__start_from": "sft"}, ["pretrain", "sft", "rm"]),
    ("rm", BIGGER, ["reward_pretrain", "rm"]),
    ("rm", {"data__comparisons": "demo:"}, ["pretrain", "sft", "collect", "rm"]),
    ("ppo", {}, ["pretrain", "sft", "rm", *LAST, "ppo", "evaluate"]),
    (
      "ppo_ptx",
      {"evaluate__compare": ("ppo",)},
      ["pretrain", "sft", "rm", *LAST, "ppo", "ppo_ptx", "evaluate"],
    ),
    (
      "evaluate",
      {"evaluate__compare": ("ppo_ptx",), "evaluate__overoptimization": True},
      ["pretrain", "sft", "rm", *LAST, "ppo_ptx", "ppo_beta0", "evaluate"],
    ),
    (
      "evaluate",
      {"data__comparisons": "demo:", "collect__rounds": 2, "evaluate__compare": ()},
      [
        *("pretrain", "sft", "collect", "rm", *LAST, "ppo_ptx"),
        *("collect_2", "rm_2", "ppo_ptx_2", "evaluate"),
      ],
    ),
    (
      "rm",
      {"data__comparisons": "demo:", "collect__rounds": 2},
      ["pretrain", "sft", "collect", "rm"],
    ),
    ("rm", {"model__weights": "other/pretrain"}, ["rm"]),  # one network: both start from them
    ("rm", {"model__weights": "other/pretrain"} | BIGGER, ["reward_pretrain", "rm"]),
    (
      "rm",
      {"model__weights": "other/pretrain", "reward_model__weights": "other/pretrain"},
      ["rm"],
    ),
  ],
)
def test_plan(stage, changes, expected):
  assert lineage.plan(config(stage, **changes)) == expected


@pytest.mark.parametrize(
  "stage, changes, expected",
  [
    ("rm", {}, ("pretrain",)),
    ("rm", BIGGER, ("reward_pretrain",)),
    ("rm", {"rm__start_from": "sft"}, ("sft",)),
    ("rm", BIGGER | {"data__comparisons": "demo:"}, ("reward_pretrain", "collect")),
    ("collect", {}, ("sft",)),
    ("ppo", {}, ("ppo_init", "rm")),
    ("evaluate", {}, ("rm", "sft_select", "ppo_init", "ppo_ptx")),
    (
      "evaluate",
      {"evaluate__compare": ("ppo",), "evaluate__overoptimization": True},
      ("rm", "sft_select", "ppo_init", "ppo", "ppo_ptx", "ppo_beta0"),
    ),
  ],
)
def test_parents(stage, changes, expected):
  assert lineage.parents(config(**changes), stage) == expected


def test_variants_of_ppo():
  cfg = config(ppo__kl_controller="adaptive", ppo__max_kl=9.0)
  assert lineage.variant(cfg, "ppo_ptx") == cfg.ppo
  assert lineage.variant(cfg, "ppo") == dataclasses.replace(cfg.ppo, gamma=0.0)
  free = dict(gamma=0.0, beta=0.0, kl_controller="fixed", max_kl=0.0)
  iterations = cfg.evaluate.overoptimization_iterations
  assert iterations != cfg.ppo.num_iterations
  expected = dataclasses.replace(cfg.ppo, num_iterations=iterations, **free)
  assert lineage.variant(cfg, "ppo_beta0") == expected


def test_baselines_have_no_settings_of_a_value_network_and_answers_in_groups():
  cfg = config(
    ppo__value_init="policy",
    ppo__value_warmup=1,
    evaluate__group_size=2,
    evaluate__compare=("grpo",),
  )
  assert cfg.ppo.samples_per_prompt == 1 and lineage.rl_stages(cfg) == ["ppo_ptx", "grpo"]
  for name in ("rloo", "grpo"):
    held = dict(advantage=name, gamma=0.0, value_init="reward_model", value_warmup=0)
    expected = dataclasses.replace(cfg.ppo, samples_per_prompt=2, **held)
    assert lineage.variant(cfg, name) == expected
    expected.validate("config.ppo")  # as the stage does; without what is held it would be refused


@pytest.mark.parametrize(
  ("iterations", "count", "expected"),
  [
    (40, 4, (8, 16, 24, 32)),
    (12, 3, (3, 6, 9)),
    (7, 2, (2, 5)),  # of 2.33 and 4.67
    (4, 1, (2,)),
    (4, 0, ()),
    (4, 3, (1, 2, 3)),
    (4, 50, (1, 2, 3)),  # neither twice the same, nor the start, nor the end
    (1, 4, ()),
  ],
)
def test_checkpoints_lie_evenly_between_start_and_end(iterations, count, expected):
  changes = dict(ppo__num_iterations=iterations, evaluate__checkpoints=count)
  assert lineage.kept_steps(config(**changes), "ppo_ptx") == expected


def test_a_run_of_another_length_has_other_checkpoints():
  own = config(
    ppo__num_iterations=8, evaluate__overoptimization_iterations=20, evaluate__checkpoints=3
  )
  assert lineage.kept_steps(own, "ppo") == (2, 4, 6)
  assert lineage.kept_steps(own, "ppo_beta0") == (5, 10, 15)


def test_a_finished_rl_stage_may_be_measured_at_other_checkpoints():
  few, many = (config(evaluate__checkpoints=count) for count in (1, 3))
  same = lambda stage: lineage.blocks(few, stage) == lineage.blocks(many, stage)
  assert same("ppo") and same("ppo_ptx") and not same("evaluate")


def test_equal_networks_share_their_base():
  shared, apart = config(), config(**BIGGER)
  assert shared.model == shared.reward_model
  assert lineage.bases(shared) == ("pretrain",)
  assert lineage.bases(apart) == ("pretrain", "reward_pretrain")
  stages = [lineage.stage_of(cfg, "reward_base") for cfg in (shared, apart)]
  assert stages == ["pretrain", "reward_pretrain"]


def test_each_stage_that_trains_before_rl_may_be_given():
  paths = dict(model="a", reward_model="b", sft="c", ppo_init="d")
  cfg = config(**{f"{block}__weights": path for block, path in paths.items()})
  stages = ("pretrain", "reward_pretrain", "sft", "ppo_init", "rm", "ppo", "evaluate")
  given = [lineage.given(cfg, stage) for stage in stages]
  assert given == ["a", "b", "c", "d", "", "", ""]
  assert lineage.given(config(rm__weights="e"), "rm") == "e"


GIVEN = {
  "sft": {"sft__weights": "a"},
  "init": {"ppo_init__weights": "b"},
  "rm": {"rm__weights": "c"},
}


@pytest.mark.parametrize(
  ("given", "changes", "expected"),
  [
    # The rm stage stays, to measure.
    (("sft", "init", "rm"), {}, ["rm", "ppo_ptx", "evaluate"]),
    # No baseline is trained for the comparison alone.
    (("init", "rm"), {}, ["rm", "ppo_ptx", "evaluate"]),
    (("init",), {}, ["pretrain", "rm", "ppo_ptx", "evaluate"]),
    (("init",), {"rm__start_from": "sft"}, ["pretrain", "sft", "rm", "ppo_ptx", "evaluate"]),
    # Of a given baseline no epoch is selected.
    (("sft",), {}, ["pretrain", "rm", "ppo_init", "ppo_ptx", "evaluate"]),
    (("sft",), {"rm__start_from": "sft"}, ["pretrain", "rm", "ppo_init", "ppo_ptx", "evaluate"]),
    (("rm",), {}, ["pretrain", "sft", "rm", *LAST, "ppo_ptx", "evaluate"]),
    (("rm",), BIGGER, ["pretrain", "sft", "rm", *LAST, "ppo_ptx", "evaluate"]),
    # Without RL, nothing but the evaluation itself needs the reward model.
    (("sft", "init", "rm"), {"stage": "evaluate"}, ["rm", "evaluate"]),
    (
      ("init", "rm"),
      {"data__comparisons": "demo:"},
      ["pretrain", "sft", "collect", "rm", "ppo_ptx", "evaluate"],
    ),
  ],
)
def test_what_is_given_is_left_out_with_all_that_only_it_needs(given, changes, expected):
  changes = changes | {name: path for one in given for name, path in GIVEN[one].items()}
  assert lineage.plan(config(changes.pop("stage", "ppo_ptx"), **changes)) == expected


def test_the_given_are_judged():
  cfg = config(**GIVEN["sft"], **GIVEN["init"], **GIVEN["rm"])
  assert lineage.line(cfg, "evaluate") == ["sft", "rm", "ppo_init", "ppo_ptx", "evaluate"]
  assert "sft" not in lineage.line(config(**GIVEN["init"], **GIVEN["rm"]), "evaluate")


def test_documents_are_needed_where_something_is_trained_on_them():
  bare = dict(data__documents="")
  assert lineage.reads(config(**bare), "ppo") == ("prompts",)
  assert lineage.reads(config(**bare), "evaluate") == ("prompts", "demonstrations")
  assert lineage.reads(config(**bare), "ppo_ptx") == ("prompts", "documents")
  assert lineage.reads(config(ppo__gamma=0.0, **bare), "ppo_ptx") == ("prompts",)
  assert lineage.reads(config(), "ppo") == ("prompts", "documents")
  assert "documents" in lineage.reads(config(**bare), "sft")


def test_the_given_weights_that_a_network_descends_from():
  cfg = config(model__weights="base", reward_model__weights="other", **BIGGER)
  stages = ("pretrain", "sft", "ppo_init", "ppo_ptx", "rm", "reward_pretrain")
  assert [lineage.origin(cfg, stage) for stage in stages] == ["base"] * 4 + ["other"] * 2
  cfg = config(model__weights="base", **GIVEN["sft"], **GIVEN["init"], **GIVEN["rm"])
  assert [lineage.origin(cfg, stage) for stage in stages[:5]] == ["base", "a", "b", "b", "c"]
  assert lineage.origin(config(**GIVEN["sft"], rm__start_from="sft"), "rm") == "a"
  assert [lineage.origin(config(), stage) for stage in stages] == [""] * 6


def test_a_given_reward_model_reads_what_there_is():
  bare = dict(data__comparisons="", data__demonstrations="")
  assert lineage.reads(config(**GIVEN["rm"]), "rm") == ("comparisons", "demonstrations")
  assert lineage.reads(config(**GIVEN["rm"], data__comparisons=""), "rm") == ("demonstrations",)
  assert lineage.reads(config(**GIVEN["rm"], **bare), "rm") == ()
  assert lineage.reads(config(**bare), "rm") == ("comparisons", "demonstrations")


def test_a_stage_without_parents_is_no_base_for_that(monkeypatch):
  """One that labels prompts, say: it starts from nothing, and it has no network that the config could give."""
  row = dataclasses.replace(lineage.STAGES["collect"], name="label", parents=())
  monkeypatch.setitem(lineage.STAGES, "label", row)
  assert lineage.given(config(model__weights="there"), "label") == ""


def test_a_second_stage_on_the_reward_models_network_chooses_no_start(monkeypatch):
  """Which base a stage starts from is rm's question, not that of the network."""
  row = dataclasses.replace(lineage.STAGES["rm"], name="critic", kind="sft", parents=("sft", "rm"))
  monkeypatch.setitem(lineage.STAGES, "critic", row)
  assert lineage.parents(config(), "critic") == ("sft", "rm")


def test_a_row_says_which_setting_asks_for_its_stage(monkeypatch):
  cfg = config(evaluate__overoptimization=True)
  assert lineage.rl_stages(cfg) == ["ppo_ptx", "ppo_beta0"]
  row = dataclasses.replace(lineage.STAGES["ppo"], asked_by="evaluate.overoptimization")
  monkeypatch.setitem(lineage.STAGES, "ppo", row)
  assert lineage.rl_stages(cfg) == ["ppo", "ppo_ptx", "ppo_beta0"]
  assert lineage.rl_stages(config()) == ["ppo_ptx"]


def test_adapters_learn_at_a_higher_rate():
  cfg = config(adapter__rank=2, adapter__rate_factor=4.0)
  rate = cfg.sft.optim.learning_rate
  assert lineage.optim(cfg, cfg.sft.optim) == dataclasses.replace(
    cfg.sft.optim, learning_rate=4 * rate
  )
  assert lineage.optim(config(), cfg.sft.optim) == cfg.sft.optim


def test_collected_comparisons_are_read_from_no_source():
  stages = ["rm", "ppo"]
  assert lineage.kinds_read(config(), stages) == [
    "comparisons",
    "demonstrations",
    "documents",
    "prompts",
  ]
  collected = config(data__comparisons="demo:")
  assert lineage.kinds_read(collected, stages) == ["demonstrations", "documents", "prompts"]
  assert lineage.kinds_read(collected, ["rm"]) == ["demonstrations"]


def test_a_later_rounds_reward_model_reads_the_rankings_of_all_rounds_so_far():
  cfg = config(data__comparisons="demo:", collect__rounds=3)
  assert lineage.collected(cfg, "rm") == ("collect",)
  assert lineage.collected(cfg, "rm_3") == ("collect", "collect_2", "collect_3")
  assert lineage.contents(cfg, "rm") == ("comparisons", "demonstrations")
  assert lineage.contents(cfg, "rm_2") == ("comparisons", "demonstrations", "collect_2")
  assert lineage.parents(cfg, "rm_2") == ("pretrain", "collect", "collect_2")
  assert lineage.parents(cfg, "collect_3") == ("ppo_ptx_2",)
  assert lineage.parents(cfg, "ppo_ptx_3") == ("ppo_init", "rm_3")
  assert lineage.reward_model("ppo_beta0") == "rm" and lineage.reward_model("ppo_ptx_2") == "rm_2"
  assert {"rm_2", "rm_3", "ppo_ptx_3"} <= set(lineage.parents(cfg, "evaluate"))
  one = config(data__comparisons="demo:")
  assert not {"rm_2", "ppo_ptx_2"} & set(lineage.parents(one, "evaluate"))
  assert lineage.collected(config(), "rm") == ()  # of one's own
