"""What a stage's fingerprint says of the base of its adapter."""

import json
import pathlib

import pytest

from instructjax.core.errors import UserError
from instructjax.train import adapter_base
from instructjax.train.adapter_base import BASE, BaseRecord

SETTINGS = dict(rank=8, alpha=16.0, targets=["q", "v"], dropout=0.0, base="float", rate_factor=10.0)
STAGE = pathlib.Path("/runs/a/ppo")


def made_with(kind, **adapter):
  record = dict(stage="sft", kind=kind, checksum="c", inside=False)
  return {"config.adapter": json.dumps(SETTINGS | adapter), BASE: json.dumps(record)}


def test_a_base_lies_where_the_run_trained_it_or_was_given_it_or_is_told():
  place = lambda kind, named="": adapter_base.of_stage(
    STAGE, made_with(kind), BASE, named, "/given"
  )
  own = place("own")
  assert (own.base, own.is_named, own.cfg.rank) == ("/runs/a/sft", False, 8)
  assert own.record == BaseRecord("sft", "own", "c", False)
  assert place("hf").base == "/given"
  moved = place("own", "/moved")
  assert (moved.base, moved.is_named) == ("/moved", True)


def test_a_stage_that_trained_all_weights_has_none():
  assert adapter_base.of_stage(STAGE, {}, BASE, "", "") is None


@pytest.mark.parametrize("record", [None, "[]", "{}", '{"stage": "sft"}', "x"])
def test_a_record_that_says_nothing_is_refused(record):
  changed = made_with("own") | {BASE: record}
  if record is None:
    del changed[BASE]
  with pytest.raises(UserError, match="does not say which base its adapter belongs to"):
    adapter_base.of_stage(STAGE, changed, BASE, "", "")


def test_settings_that_no_adapter_can_have_are_refused():
  with pytest.raises(UserError, match="/runs/a/ppo/done.json"):
    adapter_base.of_stage(STAGE, made_with("own", rank=-1), BASE, "", "")
