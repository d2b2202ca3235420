"""The settings of preset `weights`: the paper's by size, as the presets of the paper's sizes have them."""

import pytest

from configs import models, weights

# Parameters, and the preset whose settings they get.
SIZES = {
  "tiny": (4e4, "gpt3_1p3b"),
  "135M": (1.35e8, "gpt3_1p3b"),
  "1.3B": (1.3e9, "gpt3_1p3b"),
  "2.8B": (2.8e9, "gpt3_2p7b"),
  "6.7B": (6.7e9, "gpt3_6p7b"),
  "13B": (1.3e10, "gpt3_13b"),
  "175B": (1.75e11, "gpt3_175b"),
}


def chosen(num_params, context=2048):
  return {
    name: value
    for choice in weights.choices(int(num_params), int(num_params), context)
    for name, value in choice.values.items()
  }


def at(config, name):
  for part in name.split("."):
    config = config[part]
  return config


@pytest.mark.parametrize("size", SIZES)
def test_rates_and_batches_are_those_of_the_papers_size(size):
  num_params, preset = SIZES[size]
  found, config = chosen(num_params), models.get("ppo_ptx", preset)
  names = [name for name in found if name.endswith("learning_rate")]
  names += ["sft.batch_size", "ppo_init.batch_size", "rm.batch_size", "ppo.batch_size"]
  names += ["ppo.num_minibatches", "data.max_prompt_length", "data.max_response_length"]
  names += ["sft.length", "ppo_init.length", "ppo.ptx_length"]
  assert len(names) == 15
  assert {name: found[name] for name in names} == {name: at(config, name) for name in names}


@pytest.mark.parametrize(
  ("context", "half", "row"), [(64, 32, 64), (127, 63, 127), (2048, 1024, 2048), (8192, 1024, 2048)]
)
def test_lengths_fit_the_context(context, half, row):
  found = chosen(1e8, context)
  assert found["data.max_prompt_length"] == found["data.max_response_length"] == half
  assert {
    value for name, value in found.items() if name.endswith("length") and "max" not in name
  } == {row}


def test_large_networks_are_split_over_devices():
  assert chosen(9e8)["execution.dtype"] == "float32" and "mesh.fsdp" not in chosen(9e8)
  large = chosen(1e9)
  assert (large["execution.dtype"], large["mesh.data"], large["mesh.fsdp"]) == ("bfloat16", 1, -1)


SIZES_OF_BATCHES = {
  "sft.batch_size": 12,
  "ppo_init.batch_size": 32,
  "rm.batch_size": 64,
  "pretrain.batch_size": 7,
  "reward_pretrain.batch_size": 32,
  "ppo.batch_size": 512,
  "ppo.num_minibatches": 8,
  "ppo.ptx_rows": 8,
  "ppo.packed_rows": 0,
}


def test_microbatches_divide_the_batches_that_the_user_has_chosen():
  cut = lambda num_params, **changes: (
    weights.microbatches(
      num_params, (SIZES_OF_BATCHES | {f"ppo.{k}": v for k, v in changes.items()}).__getitem__
    ).values
  )
  assert cut(10**8) == {
    "sft.microbatches": 2,  # of 6 rows: 12 has no 8
    "ppo_init.microbatches": 4,
    "rm.microbatches": 8,
    "pretrain.microbatches": 1,
    "reward_pretrain.microbatches": 4,
    "ppo.microbatches": 8,  # 64 episodes
    "ppo.score_microbatches": 64,  # 512
    "ppo.ptx_microbatches": 64,  # 512 rows of a minibatch
  }
  assert cut(10**9) == {"ppo.ptx_microbatches": 8}
  few = cut(10**8, batch_size=13, num_minibatches=1, ptx_rows=1)
  assert (few["ppo.microbatches"], few["ppo.score_microbatches"]) == (13, 13)
  packed = cut(10**8, packed_rows=4)
  assert "ppo.microbatches" not in packed and "ppo.score_microbatches" not in packed
  assert cut(10**8, batch_size=0, num_minibatches=0, ptx_rows=0)  # refused later, with the rule


def test_every_choice_is_a_setting_with_a_reason():
  config = models.get("ppo_ptx", weights.NAME)
  for choice in weights.choices(10**9, 10**9, 512):
    assert choice.reason and all(at(config, name) is not None for name in choice.values)
