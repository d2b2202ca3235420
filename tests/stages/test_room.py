"""The lower bound of a run's memory: numbers worked out by hand, what is refused, and what is not."""

import dataclasses
import time

import pytest

from configs import models
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from instructjax.core.stages import TARGETS
from instructjax.stages import lineage, room
from tests.core.plain import changed

ONE = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}
GIB = 2**30


def config(**changes):
  return from_config_dict(changed(**changes))


def small(**changes):
  """A network of 2 layers: d = 4, 2 heads and 1 of keys of 3, MLP of 8, 10 words, rotary positions."""
  block = dict(
    num_layers=2, d_model=4, num_heads=2, num_kv_heads=1, head_dim=3, d_mlp=8, position="rope",
    mlp="gelu", tie_embeddings=True,
  )  # fmt: skip
  return dataclasses.replace(config().model.network, **block | changes)


@pytest.mark.parametrize(
  "changes, expected",
  [
    # A layer: q 4*6, k and v 2*4*3, o 6*4, MLP 2*4*8; two of them, and 10 rows of 4.
    ({}, 2 * (24 + 24 + 24 + 64) + 40),
    ({"mlp": "swiglu"}, 2 * (24 + 24 + 24 + 96) + 40),
    ({"mlp": "geglu"}, 2 * (24 + 24 + 24 + 96) + 40),
    ({"mlp": "gelu_exact"}, 2 * 136 + 40),
    ({"tie_embeddings": False}, 2 * 136 + 80),
    ({"position": "learned", "max_length": 5}, 2 * 136 + 40 + 20),
  ],
)
def test_weights_are_counted(changes, expected):
  assert room.num_params(small(**changes), 10) == expected


def test_weights_are_split_over_fsdp_and_tensor_and_rows_over_data_and_fsdp():
  cfg = config(execution__dtype="float32")
  needs = room.parts(cfg, ONE, "pretrain")
  state, gradients, batch = needs.values()
  assert state == 12 * room.num_params(cfg.model.network, cfg.tokenizer.vocab_size)
  assert gradients == state / 3 and room.peak(needs) == state + max(gradients, batch)
  rows, length = cfg.pretrain.batch_size, cfg.pretrain.length
  assert batch == rows * length * cfg.model.num_layers * cfg.model.d_model * 4
  parts = dataclasses.replace(cfg, pretrain=dataclasses.replace(cfg.pretrain, microbatches=4))
  assert list(room.parts(parts, ONE, "pretrain").values())[2] == batch / 4
  split = ONE | {"data": 2, "fsdp": 2, "tensor": 2}
  assert list(room.parts(cfg, split, "pretrain").values()) == [state / 4, gradients / 4, batch / 8]


@pytest.mark.parametrize("base, size", [("float", 2), ("int8", 1)])
def test_adapters_leave_the_base_and_nothing_that_grows_with_it(base, size):
  changes = dict(adapter__rank=2, adapter__base=base, execution__dtype="bfloat16")
  cfg = config(**changes)
  policy, reward = (
    room.num_params(block, cfg.tokenizer.vocab_size)
    for block in (cfg.model.network, cfg.reward_model)
  )
  frozen, _ = room.parts(cfg, ONE, "sft").values()
  assert frozen == size * policy
  assert [*room.parts(cfg, ONE, "rm").values()][0] == size * reward
  frozen, _, _ = room.parts(cfg, ONE | {"fsdp": 2}, "ppo").values()
  assert frozen == size * (policy + reward) / 2
  shared = dataclasses.replace(cfg, reward_model=cfg.model)
  assert [*room.parts(shared, ONE, "ppo").values()][0] == size * policy  # one base for all four
  assert [*room.parts(cfg, ONE, "pretrain").values()][0] == 12 * policy  # trained whole


def test_what_an_rl_stage_holds_hand_worked():
  cfg = config(execution__dtype="float32", rollout__slots=10, ppo__batch_size=16)
  policy, reward = (
    room.num_params(block, cfg.tokenizer.vocab_size)
    for block in (cfg.model.network, cfg.reward_model)
  )
  # Policy and value network are trained; the reference and the reward model stay in two bytes a weight.
  state, gradients, sampled, minibatch = room.parts(cfg, ONE, "ppo").values()
  assert state == 12 * (policy + reward) + 2 * (policy + reward)
  assert gradients == 4 * max(policy, reward)  # one network is updated at a time
  # Of 10 answers, keys and values of 12 + 20 tokens in 2 layers of 2 heads of 48, and scores of 2000 words.
  assert sampled == 10 * (2 * 32 * 2 * 2 * 48 * 4 + 2000 * 4)
  # Of 16 / 2 episodes, 2 layers' inputs of 96. PPO-ptx reads 8 * 2 rows of 64 tokens of text in 2 parts.
  assert minibatch == 8 * 32 * 2 * 96 * 4
  assert [*room.parts(cfg, ONE, "ppo_ptx").values()][3] == 8 * 64 * 2 * 96 * 4
  half = dataclasses.replace(cfg.execution, dtype="bfloat16")
  found = [*room.parts(dataclasses.replace(cfg, execution=half), ONE, "ppo").values()]
  assert found[2:] == [10 * (2 * 32 * 2 * 2 * 48 * 2 + 2000 * 4), minibatch / 2]
  bare = dataclasses.replace(cfg.ppo, advantage="rloo", samples_per_prompt=2)
  found = [*room.parts(dataclasses.replace(cfg, ppo=bare), ONE, "ppo").values()]
  no_values = [12 * policy + 2 * (policy + reward), 4 * policy]
  assert found[:2] == no_values == [*room.parts(cfg, ONE, "grpo").values()][:2]
  parts = dataclasses.replace(cfg, ppo=dataclasses.replace(cfg.ppo, microbatches=4))
  assert [*room.parts(parts, ONE, "ppo").values()][3] == minibatch / 4
  split = [*room.parts(cfg, ONE | {"data": 2, "fsdp": 2, "tensor": 2}, "ppo").values()]
  assert split == [
    state / 4,
    gradients / 4,
    3 * (2 * 32 * 2 * 2 * 24 * 4 + 2000 * 4),
    minibatch / 8,
  ]


@pytest.mark.parametrize("stage", TARGETS)
def test_the_default_preset_needs_little(stage):
  cfg = config(stage=stage)
  room.require(cfg, ONE, lineage.plan(cfg), 1 * GIB, "this machine")


@pytest.mark.parametrize(
  "changes, named",
  [
    ({"pretrain__batch_size": 10**9}, "pretrain.batch_size=1000000000"),
    ({"sft__batch_size": 10**9}, "sft.batch_size=1000000000"),
    ({"rm__batch_size": 10**9}, "rm.batch_size=1000000000"),
    ({"ppo__batch_size": 10**9, "ppo__num_minibatches": 1000}, "ppo.batch_size=1000000000"),
    ({"model__num_layers": 10**6, "model__d_model": 4096}, "model.num_layers=1000000"),
    ({"reward_model__d_mlp": 2**30}, "reward_model"),
    ({"tokenizer__vocab_size": 2**31 - 1}, "model.num_layers"),
  ],
)
def test_what_cannot_fit_is_refused_at_once(changes, named):
  cfg = config(stage="ppo_ptx", **changes)
  began = time.monotonic()
  with pytest.raises(UserError) as refused:
    room.require(cfg, ONE, lineage.plan(cfg), 1000 * GIB, "this machine")
  assert time.monotonic() - began < 5
  line = str(refused.value)
  assert (
    named in line and "this machine has 1,000.0 GiB" in line and "GiB of memory by estimate" in line
  )


def test_it_can_be_tried_all_the_same():
  cfg = config(stage="pretrain", pretrain__batch_size=10**9, guard__memory="ignore")
  room.require(cfg, ONE, ["pretrain"], 1.0, "this machine")


def test_devices_of_one_host_share_its_memory():
  cfg = config(stage="pretrain")
  needed = room.peak(room.parts(cfg, ONE, "pretrain"))
  room.require(cfg, ONE, ["pretrain"], 1.5 * needed, "this machine")
  with pytest.raises(UserError):
    room.require(cfg, ONE, ["pretrain"], 1.5 * needed, "this machine", share=2)


def test_a_containers_limit_counts(tmp_path):
  limit = tmp_path / "memory.max"
  whole = room.host_memory(limit)
  assert whole > 2**28
  limit.write_text("1048576\n")
  assert room.host_memory(limit) == 2**20
  limit.write_text("max\n")
  assert room.host_memory(limit) == whole


@pytest.mark.parametrize(
  "preset, fsdp, tensor, in_use",
  [("gpt3_1p3b", 64, 4, 5.18), ("gpt3_6p7b", 64, 4, 9.03), ("gpt3_175b", 64, 16, 30.80)],
)
def test_it_stays_below_what_the_compiler_says(preset, fsdp, tensor, in_use):
  """GiB in use at the peak of ppo_ptx: docs/pods.md, "What it says of the paper's sizes"."""
  cfg = from_config_dict(models.get("ppo_ptx", preset))
  needs = room.parts(cfg, ONE | {"fsdp": fsdp, "tensor": tensor}, "ppo_ptx")
  assert 0.1 * in_use < room.peak(needs) / GIB < in_use


def test_sampling_and_training_are_not_at_one_time():
  needs = room.parts(config(stage="ppo"), ONE, "ppo")
  state, gradients, answers, minibatch = needs.values()
  assert room.peak(needs) == state + max(gradients, answers, minibatch) < sum(needs.values())


@pytest.mark.parametrize("preset", ["gpt3_175b", "llama3_8b"])
def test_large_presets_fit_the_pods_that_they_are_made_for(preset):
  cfg = from_config_dict(models.get("ppo_ptx", preset))
  room.require(cfg, ONE | {"fsdp": 1024}, lineage.plan(cfg), 31 * GIB, "a chip")
