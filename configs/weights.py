"""The preset `weights`: the paper's settings for a network whose shape is read from a file of weights.

`--config=configs/ppo_ptx.py:weights --config.model.weights=PATH`. instructjax/commands/weights_preset.py reads the file
and calls `choices`; a config file alone cannot, because it runs before the flags are known.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

NAME = "weights"
_CONTEXT = 2048  # App. C: 2k tokens
_HALF = 1024  # App. C: longest prompt, and longest answer
_ROWS = 8  # of a microbatch of a small network: up to 8 devices can share it
_LARGE = 1e9  # parameters from which on a network is split over devices


class Choice(NamedTuple):
  """Settings that follow from the size of the networks, and why."""

  values: Mapping[str, Any]  # dotted name -> value
  reason: str


class _Size(NamedTuple):
  """What App. C prints for one size of the policy."""

  name: str
  num_params: float  # parameters from which on it is used
  sft: tuple[float, int]  # C.1: learning rate, batch
  ppo_init: tuple[float, int]  # C.3
  policy_rate: float  # E.9: see `_rates`
  value_rate: float  # C.4


# A size between two printed ones uses the settings of the smaller one, as gpt3.py does.
_SIZES = (
  _Size("1.3B", 0, (9.65e-6, 32), (5e-6, 32), 8.05e-6, 9e-6),
  _Size("6B", 6e9, (9.65e-6, 32), (1.04e-5, 32), 8.05e-6, 9e-6),
  _Size("175B", 1.6e11, (5.03e-6, 8), (2.45e-6, 8), 2.55e-6, 5e-6),
)


def choices(num_params: int, reward_params: int, context: int) -> list[Choice]:
  """The settings that follow from the networks' sizes, each with its reason.

  Args:
    num_params: parameters of the policy.
    reward_params: parameters of the reward model.
    context: longest context that both networks can read [tokens].
  """
  size = [one for one in _SIZES if num_params >= one.num_params][-1]
  return [
    *_rates(size),
    *_lengths(context),
    *_devices(max(num_params, reward_params)),
  ]


def size_used(num_params: int) -> str:
  """Which of the paper's sizes the settings are those of, in words."""
  size = [one for one in _SIZES if num_params >= one.num_params][-1]
  is_smaller = num_params < 1.2e9
  why = "the smallest that it prints" if is_smaller else "the largest that it prints up to this one"
  return f"the paper's settings for {size.name}, {why}"


def _rates(size: _Size) -> list[Choice]:
  stages = [
    Choice(
      {f"{stage}.optim.learning_rate": rate, f"{stage}.batch_size": batch}, f"{where}, {size.name}"
    )
    for stage, (rate, batch), where in (
      ("sft", size.sft, "C.1"),
      ("ppo_init", size.ppo_init, "C.3"),
    )
  ]
  swept = (
    "open: the smaller of the two rates that E.9 tried"
    if size.name == "175B"
    else "open: from E.9's sweep, the highest that never diverged; the final rates are not printed"
  )
  return [
    *stages,
    Choice({"rm.optim.learning_rate": 9e-6, "rm.batch_size": 64}, "C.2, for all sizes"),
    Choice({"ppo.batch_size": 512, "ppo.num_minibatches": 8}, "C.4, for all sizes"),
    Choice({"ppo.policy_optim.learning_rate": size.policy_rate}, swept),
    Choice({"ppo.value_optim.learning_rate": size.value_rate}, f"C.4, {size.name}"),
  ]


def _lengths(context: int) -> list[Choice]:
  half, row = min(_HALF, context // 2), min(_CONTEXT, context)
  is_whole = context >= _CONTEXT
  blocks = ("sft", "ppo_init", "pretrain", "reward_pretrain")
  return [
    Choice(
      {"data.max_prompt_length": half, "data.max_response_length": half},
      "App. C" if is_whole else f"half of the context of {context} tokens each, as in App. C",
    ),
    Choice(
      {**{f"{block}.length": row for block in blocks}, "ppo.ptx_length": row},
      "App. C: the policy's context" if is_whole else f"the whole context of {context} tokens",
    ),
  ]


def _devices(num_params: int) -> list[Choice]:
  """Settings of ours that decide what fits; none of them is the paper's."""
  held_out = {"pretrain.batch_size": 32, "reward_pretrain.batch_size": 32}
  rows = Choice(held_out, "open: held-out text is measured in batches of this size")
  if num_params < _LARGE:
    values = {"execution.dtype": "float32"}
    return [rows, Choice(values, "open: for one device, and for CPUs, where bfloat16 is slow")]
  values = {"execution.dtype": "bfloat16", "mesh.data": 1, "mesh.fsdp": -1}
  return [rows, Choice(values, "open: the training state is too large for a copy on every device")]


def microbatches(num_params: int, size: Callable[[str], int]) -> Choice:
  """Into how many parts batches are cut, which decides what fits in memory and no number that is learned.

  Args:
    num_params: parameters of the larger network.
    size: the size of a batch by the dotted name of its field, with the user's changes.
  """
  minibatch = max(size("ppo.batch_size") // max(size("ppo.num_minibatches"), 1), 1)
  text = minibatch * size("ppo.ptx_rows")
  if num_params >= _LARGE:
    return Choice({"ppo.ptx_microbatches": _parts(text, 64)}, "open: 64 rows at a time")
  blocks = ("sft", "ppo_init", "rm", "pretrain", "reward_pretrain")
  values = {f"{block}.microbatches": _parts(size(f"{block}.batch_size"), _ROWS) for block in blocks}
  values["ppo.ptx_microbatches"] = _parts(text, _ROWS)
  if not size("ppo.packed_rows"):  # which says itself how many rows are computed at a time
    values["ppo.microbatches"] = _parts(minibatch, _ROWS)
    values["ppo.score_microbatches"] = _parts(size("ppo.batch_size"), _ROWS)
  return Choice(values, f"open: {_ROWS} rows at a time, so that a batch need not fit in memory")


def _parts(rows: int, most: int) -> int:
  """The fewest equal parts of at most so many rows."""
  return next(
    parts for parts in range(1, max(rows, 1) + 1) if rows % parts == 0 and rows // parts <= most
  )
