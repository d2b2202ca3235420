"""The table of stages holds together: its rows name modules, config fields, records and parents that are there."""

import dataclasses
import importlib
import inspect
import pathlib
import typing

import pytest

from instructjax.core import stages
from instructjax.core.config import Config
from instructjax.core.stages import POLICIES, ROLES, STAGES, TARGETS
from instructjax.data import records

ROOT = pathlib.Path(__file__).parents[2]
ROWS = pytest.mark.parametrize("row", STAGES.values(), ids=STAGES)


def field(name: str):
  """Type of the config field of a dotted name."""
  hint = Config
  for part in name.split("."):
    hint = typing.get_type_hints(hint)[part]
  return hint


@ROWS
def test_a_stages_module_has_the_functions_that_the_pipeline_calls(row):
  module = importlib.import_module(f"instructjax.stages.{row.module}")
  functions = dict(inspect.getmembers(module, inspect.isfunction))
  parameters = {
    "run": ["ctx", "stage"],
    "check": ["ctx", "stage"],
    "check_settings": ["config", "stage"],
  }
  assert "run" in functions
  for name in parameters.keys() & functions.keys():
    assert list(inspect.signature(functions[name]).parameters) == parameters[name]


@ROWS
def test_parents_stand_above(row):
  """So the table is in the order that stages run, and nothing starts from itself."""
  above = list(STAGES)[: list(STAGES).index(row.name)]
  assert set(row.parents) <= set(above)


@ROWS
def test_what_a_row_names_is_there(row):
  assert set(row.reads) <= set(records.KINDS)
  block = field(row.block)
  assert all(field(name) is int for name in row.batches)
  settings = {f.name for f in dataclasses.fields(block)}
  assert {*row.holds, *row.takes} <= settings
  assert all(field(name) is field(f"{row.block}.{own}") for own, name in row.takes.items())
  assert row.asked_by is None or (row.is_rl and field(row.asked_by) is bool)
  assert (row.keeps is not None) == (row.kind == "sft")  # only stages/sft.py reads it
  assert dataclasses.is_dataclass(row.result)
  assert row.selects is None or (row.selects in row.parents and row.role is None)
  assert (row.role is None) or (row.role in ROLES and row.what and row.paper)
  # A base stands in for given weights: it trains a network, and it is judged.
  assert not row.is_base or (row.role and row.policy and not row.parents)


def test_every_target_has_a_config_file():
  assert all((ROOT / "configs" / f"{name}.py").is_file() for name in TARGETS)
  assert all(f'"{name}"' in (ROOT / "configs" / f"{name}.py").read_text() for name in TARGETS)


def test_policies_can_be_told_apart():
  for attribute in ("title", "colour"):
    assert len({getattr(policy, attribute) for policy in POLICIES.values()}) == len(POLICIES) == 12


def test_kinds():
  assert [name for name, row in STAGES.items() if row.is_base] == ["pretrain", "reward_pretrain"]
  assert stages.RL_STAGES == (
    *("ppo", "ppo_ptx", "ppo_ptx_2", "ppo_ptx_3", "rloo", "grpo", "ppo_beta0"),
  )
  assert [name for name, row in STAGES.items() if row.kind == "sft"] == ["sft", "ppo_init"]


def test_a_kind_that_the_table_has_once_names_its_stage():
  assert stages.stage_of_kind("rm").name == "rm"
  assert stages.stage_of_kind("evaluate").name == "evaluate"
  with pytest.raises(ValueError):
    stages.stage_of_kind("base")


def test_every_rl_stage_starts_from_the_reference_and_is_judged():
  assert set(stages.RL_STAGES) <= set(STAGES["evaluate"].parents)
  assert STAGES[stages.REFERENCE].require_policy().name == stages.REFERENCE
  assert all(stages.REFERENCE in STAGES[name].parents for name in stages.RL_STAGES)


def test_who_selects_and_who_trains():
  assert stages.selector("sft") == "sft_select"
  assert stages.selector("ppo_init") is None
  assert stages.stage_of_policy("reward_base").name == "reward_pretrain"


def test_a_stage_without_network_or_policy_says_so_where_one_is_asked_for():
  with pytest.raises(ValueError, match="collect trains no network"):
    STAGES["collect"].require_role()
  with pytest.raises(ValueError, match="rm trains no policy"):
    STAGES["rm"].require_policy()
  assert STAGES["rm"].require_role() == "reward"
  assert STAGES["ppo"].require_policy() is POLICIES["ppo"]
