"""Whether a run's arrays can fit in the memory that is there: a lower bound by arithmetic, before anything is built.

It counts what each stage holds for certain: weights and the optimiser's state, and the largest of what comes and goes
beside them: gradients, the inputs of the layers that a backward pass needs, the keys and values of answers that are
being sampled. So a run that it refuses cannot fit, and one that it passes may still not fit; `launch/plan.py` asks the
compiler. Called by pipeline.py. Imports no JAX.
"""

import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from instructjax.core.config import Config, NetworkConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import ROLES, STAGES, Stage
from instructjax.stages import lineage

_GIB = 2**30
_FLOAT = 4  # bytes of a weight, and of each of the optimiser's two moments of it
_TRAINED = 3 * _FLOAT  # weight, two moments
_READ = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes of a weight of a frozen base, at least
_FROZEN = 2  # bytes of a weight that only scores, at least
_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def host_memory(limit: pathlib.Path = _LIMIT) -> float:
  """Bytes of memory that this host, or the container around this process, has."""
  total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  try:
    return float(min(total, int(limit.read_text())))
  except (OSError, ValueError):  # no container, or one without a limit ("max")
    return float(total)


def num_params(network: NetworkConfig, vocab_size: int) -> int:
  """Weights of a network, without those of biases and norms."""
  attention = 2 * network.d_model * network.head_dim * (network.num_heads + network.num_kv_heads)
  matrices = 3 if network.is_gated else 2
  layer = attention + matrices * network.d_model * network.d_mlp
  rows = vocab_size * (1 if network.tie_embeddings else 2)
  rows += network.max_length if network.position == "learned" else 0
  return network.num_layers * layer + rows * network.d_model


def parts(config: Config, mesh: Mapping[str, int], stage: str) -> dict[str, float]:
  """What a stage needs on each device for certain: what, with the settings that decide it -> bytes.

  The first is held all the time. Of the others, each is held at some time, and perhaps no two at once.

  Args:
    config: the run's config.
    mesh: mesh axis -> devices.
    stage: name of the stage.
  """
  row = STAGES[stage]
  if row.role is None or lineage.given(config, stage):
    return {}
  split_weights = mesh["fsdp"] * mesh["tensor"]
  split_rows = mesh["slice"] * mesh["data"] * mesh["fsdp"]
  itemsize = 2 if config.execution.dtype == "bfloat16" else 4
  cfg: Any = lineage.variant(config, stage) if row.is_rl else getattr(config, row.block)
  block, vocab = ROLES[row.role].block, config.tokenizer.vocab_size
  network: NetworkConfig = getattr(config, block)
  data = config.data
  total = data.max_prompt_length + data.max_response_length
  rows_of = lambda rows: math.ceil(rows / split_rows)

  def inputs(rows: float, length: int) -> float:
    """Bytes of the inputs of all layers."""
    per_token = network.num_layers * network.d_model * itemsize / mesh["tensor"]
    return max(1.0, rows) * length * per_token

  if not row.is_rl:
    tokens = (cfg.batch_size // cfg.microbatches, total if row.kind == "rm" else cfg.length)
    names = f"config.{row.block}.batch_size={cfg.batch_size}, microbatches={cfg.microbatches}, {tokens[1]} tokens a row"
    answers = 1
    if row.kind == "rm" and cfg.row_length:
      # Packed into rows, the answers need what they have of tokens: two of some, at least, the prompt's and their own.
      answers, tokens = (1, (tokens[0], 3)) if cfg.share_prompts else (2, (tokens[0], 2))
    elif row.kind == "rm":
      answers = cfg.max_responses
    return {
      **_weights(config, row, split_weights),
      f"a batch ({names})": inputs(rows_of(tokens[0] * answers), tokens[1]),
    }
  decoding = rows_of(config.rollout.slots or cfg.batch_size)
  keys = (
    2 * network.num_layers * network.num_kv_heads * network.head_dim * itemsize / mesh["tensor"]
  )
  minibatch = cfg.batch_size // cfg.num_minibatches
  trained = rows_of(minibatch // cfg.microbatches) if not cfg.packed_rows else 1
  mixed = rows_of(minibatch * cfg.ptx_rows // cfg.ptx_microbatches) if cfg.gamma else 0
  return {
    **_weights(config, row, split_weights),
    f"answers being sampled (config.{row.block}.batch_size={cfg.batch_size}, rollout.slots={config.rollout.slots})": (
      decoding * (total * keys + vocab * _FLOAT)
    ),
    f"a minibatch (config.{row.block}.batch_size={cfg.batch_size}, num_minibatches={cfg.num_minibatches},"
    f" microbatches={cfg.microbatches})": max(
      inputs(trained, total), inputs(mixed, cfg.ptx_length)
    ),
  }


def _weights(config: Config, row: Stage, split: int) -> dict[str, float]:
  """What `parts` says of weights, optimisers and gradients, which are split over so many devices."""
  block, vocab = ROLES[row.require_role()].block, config.tokenizer.vocab_size
  network: NetworkConfig = getattr(config, block)
  size, reward = num_params(network, vocab), num_params(config.reward_model, vocab)
  shape = f"config.{block}.num_layers={network.num_layers}, d_model={network.d_model}"
  if lineage.is_adapted(config) and not row.is_base:
    # What is trained is small, and so are its gradients.
    frozen = lineage.frozen_stages(config)
    # Two that are given may be adapters of one base, which only their files tell.
    may_be_one = config.same_network and all(lineage.given(config, stage) for stage in frozen)
    is_apart = len(set(frozen)) > 1 and not may_be_one
    number = "int8" if config.adapter.base == "int8" else config.execution.dtype
    held = (size + reward * (row.is_rl and is_apart)) * _READ[number]
    held += reward * len(config.ppo.ensemble) * _FROZEN * row.is_rl  # whole networks
    return {f"the frozen base ({shape})": held / split}
  if not row.is_rl:
    return {
      f"weights and optimiser ({shape})": size * _TRAINED / split,
      "gradients": size * _FLOAT / split,
    }
  frozen = (1 + len(config.ppo.ensemble)) * _FROZEN
  value = reward * lineage.variant(config, row.name).has_value_network
  held = size * (_TRAINED + _FROZEN) + reward * frozen + value * _TRAINED
  return {
    f"weights and optimiser ({shape}), those of reward_model included": held / split,
    "gradients": max(size, value) * _FLOAT / split,
  }


def peak(needs: Mapping[str, float]) -> float:
  """The bytes that `parts` add up to, at least."""
  held, *passing = needs.values() or [0.0]
  return held + max(passing, default=0.0)


def require(
  config: Config,
  mesh: Mapping[str, int],
  stages: Collection[str],
  memory: float,
  device: str,
  share: int = 1,
):
  """Refuses a run of which a stage cannot fit.

  Args:
    config: the run's config.
    mesh: mesh axis -> devices.
    stages: the stages that are still to run.
    memory: bytes of a device, or of a host whose devices share its memory.
    device: what has that memory, for the message.
    share: devices that share it.
  Raises:
    UserError: a stage needs more; it names the estimate, what is there, and the largest part.
  """
  if config.guard.memory == "ignore":
    return
  for stage in stages:
    needs = parts(config, mesh, stage)
    needed = share * peak(needs)
    if needed > memory:
      largest = max(needs, key=lambda name: needs[name])
      raise UserError(
        f"stage {stage} needs at least {_gib(needed)} of memory by estimate, and {device} has {_gib(memory)}; most of"
        f" it is for {largest}: {_gib(share * needs[largest])}. Lower it, or use more devices;"
        " --config.guard.memory=ignore tries all the same"
      )


def _gib(size: float) -> str:
  return f"{size / _GIB:,.1f} GiB" if size < 1e6 * _GIB else f"{size / _GIB:.1e} GiB"
