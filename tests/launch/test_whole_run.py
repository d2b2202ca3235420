"""The hours of a run: which stages count, and how many steps they have."""

import pytest

from instructjax.core.config import from_config_dict
from launch import lengths, topology, whole_run
from tests.launch.small import mesh_of, settings

CHIP = topology.CHIPS["v5e"]
RECORDS = whole_run.Records(demonstrations=100, comparisons=20)
CONFIG = from_config_dict(settings(mesh=dict(data=1, fsdp=2, tensor=2)))


def test_stages_of_a_run():
  config = CONFIG
  mesh = mesh_of(config)
  expected, _ = whole_run.sketched(config, "ppo_ptx", mesh, CHIP, lengths.BOUND)
  known = "ppo_ptx", expected, "compiled"
  times, left_out = whole_run.stages(config, known, mesh, CHIP, lengths.BOUND, RECORDS)
  steps = {one.stage: one.steps for one in times}
  # 100 demonstrations, a row each, 8 rows a batch: 13 batches, 16 epochs. With a tenth of text 14, 2 epochs. 20 prompts
  # of 8 are 3 batches.
  assert steps == {
    "pretrain": config.pretrain.num_steps,
    "sft": 208,
    "ppo_init": 28,
    "rm": 3,
    "ppo": 500,
    "ppo_ptx": 500,
  }
  assert {one.stage: one.source for one in times}["ppo_ptx"] == "compiled"
  assert left_out == ["sft_select (trains nothing)", "evaluate (trains nothing)"]
  by_name = {one.stage: one.expected.seconds for one in times}
  assert 0 < by_name["ppo"] < by_name["ppo_ptx"] and by_name["sft"] > 0
  # Decoding, prefill, scoring and update: the pretraining term is in the last.
  assert [part.name for part in expected.parts] == ["decoding", "prefill", "scoring", "update"]
  assert whole_run.words(RECORDS).startswith("100 demonstrations and 20 prompts with comparisons")


def test_shorter_texts_make_fewer_steps():
  config = CONFIG
  half = lengths.Means(64.0, 64.0)
  assert whole_run._steps(config, "sft", half, RECORDS) == 112
  assert whole_run._steps(config, "rm", half, RECORDS) == 3
  assert whole_run._steps(config, "pretrain", half, RECORDS) == pytest.approx(
    config.pretrain.num_steps
  )
