"""Which runs are a group: what they differ in by intent, and not by their seed."""

import dataclasses
import json

import pytest

from instructjax.core.errors import UserError
from instructjax.report import comparison_groups
from tests.report import runs


def test_runs_that_differ_in_their_seed_only_are_a_group():
  found = comparison_groups.groups([runs.run(1), runs.run(0), runs.run(0, 0.2), runs.run(2)])
  assert [group.label for group in found] == ["ppo.beta=0.02", "ppo.beta=0.2"]
  assert [[run.seed for run in group.runs] for group in found] == [[0, 1, 2], [0]]
  (alone,) = comparison_groups.groups([runs.run(0), runs.run(1)])
  assert (alone.label, alone.values) == ("all runs", {})


def test_groups_come_in_the_order_of_their_numbers():
  found = comparison_groups.groups([runs.run(0, beta) for beta in (10.0, 2.0, 0.5)])
  assert [group.label for group in found] == ["ppo.beta=0.5", "ppo.beta=2.0", "ppo.beta=10.0"]


def test_copies_of_a_run_are_refused():
  with pytest.raises(
    UserError, match="same settings and seed 0: copies of a run are no error bars"
  ):
    comparison_groups.groups([runs.run(0), runs.run(0)])


def test_other_stages_make_another_group():
  more = runs.run(1)
  more = dataclasses.replace(more, made={**more.made, "ppo": runs.MADE})
  found = comparison_groups.groups([runs.run(0), more])
  assert [group.label for group in found] == ["stages besides=none", "stages besides=ppo"]


def test_many_differing_settings_are_not_in_the_label():
  fields = {("sft", f"sft.field{i}"): "1" for i in range(4)}
  runs_ = [
    runs.run(0, settings=fields),
    runs.run(0, settings=dict.fromkeys(fields, "2")),
  ]
  found = comparison_groups.groups(runs_)
  assert [group.label for group in found] == ["settings 1", "settings 2"]
  assert found[1].values == {f"sft.field{i}": "2" for i in range(4)}


def test_settings_are_the_fields_that_a_run_can_differ_in_by_intent():
  fingerprints = {
    "tokenizer": {},
    "collect": {"config.collect": '{"num_prompts": 4}'},
    "rm": {
      "config.model": '{"d_model": 8, "rope_scaling": {"kind": "none"}}',
      "config.rm": '{"num_epochs": 1}',
      "config.seed": "3",
      "tokenizer": "abc",
      "parent:collect": "def",
      "data:comparisons": '{"checksum": "of what this seed collected"}',
      "data:prompts": '{"checksum": "x"}',
      "weights:rm": "w",
    },
  }
  assert comparison_groups.settings_of(fingerprints) == {
    ("collect", "collect.num_prompts"): "4",
    ("rm", "reward_model.d_model"): "8",
    ("rm", "reward_model.rope_scaling.kind"): '"none"',
    ("rm", "rm.num_epochs"): "1",
    ("rm", "data:prompts.checksum"): '"x"',
    ("rm", "weights:rm"): '"w"',
  }
  own = {"rm": {"data:comparisons": '{"checksum": "a user\'s"}'}}
  assert ("rm", "data:comparisons.checksum") in comparison_groups.settings_of(own)


def test_runs_without_a_stage_do_not_hide_what_the_others_differ_in():
  gamma = lambda value, seed: runs.run(
    seed, settings={("ppo_ptx", "ppo.gamma"): value, ("sft", "sft.num_epochs"): "2"}
  )
  without = runs.run(0, settings={("sft", "sft.num_epochs"): "2"})
  without = dataclasses.replace(
    without, made={stage: made for stage, made in without.made.items() if stage != "ppo_ptx"}
  )
  found = comparison_groups.groups([gamma("1.0", 0), gamma("30.0", 1), without])
  assert [group.values["ppo.gamma"] for group in found] == ["1.0", "30.0", "none"]


def test_weights_and_tokenizers_that_were_given_are_settings():
  given = {"ppo": {"parent:rm": "of one file", "parent:sft": "made", "tokenizer": "of a file"}}
  found = comparison_groups.settings_of(given | {"sft": {}})
  assert found == {("ppo", "parent:rm"): '"of one file"', ("ppo", "tokenizer"): '"of a file"'}
  trained = {
    "tokenizer": {
      "config.tokenizer": '{"path": "", "vocab_size": 512}',
      "tokenizer": "of this seed",
    },
    "sft": {"tokenizer": "of this seed"},
  }
  assert comparison_groups.settings_of(trained) == {
    ("tokenizer", "tokenizer.path"): '""',
    ("tokenizer", "tokenizer.vocab_size"): "512",
  }


def test_long_values_that_begin_alike_are_two_values():
  rewards = lambda name: {
    ("ppo_ptx", "ppo.rewards"): json.dumps(["rm", f"0.5*python:checks:{name}"])
  }
  found = comparison_groups.groups(
    [runs.run(0, settings=rewards("is_complete")), runs.run(1, settings=rewards("is_short"))]
  )
  assert [group.label for group in found] == ["settings 1", "settings 2"]
  assert "is_short" in found[1].values["ppo.rewards"]
