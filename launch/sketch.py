"""Estimates a step's seconds and bytes from its sizes alone, to choose the meshes that are worth compiling.

The estimate is deliberately rough, because it is used for ranking only. It considers matrix products, the gathering of
weights and scattering of gradients over `fsdp`, the summing of activations over `tensor`, and the data that a decode
step reads. It ignores latency, layouts and overlap. Called by search.py.
"""

import dataclasses
import functools
import math

import jax

from instructjax import models
from instructjax.core.config import Config
from instructjax.core.stages import STAGES
from instructjax.models import transformer
from instructjax.parallel import sharding
from instructjax.stages import lineage
from instructjax.stages.context import bare, make_model
from launch import programs
from launch.topology import Chip

_HALF, _FULL = 2, 4  # bytes of a bfloat16 and of a float32


@dataclasses.dataclass(frozen=True)
class Pass:
  """A forward pass in a step, with or without a backward pass.

  Attributes:
    model: the network.
    rows, length: shape of its tokens, for all devices together.
    outputs: number of columns for which the head is computed.
    is_training: whether there is a backward pass.
    times: number of times per step.
  """

  model: transformer.Model
  rows: int
  length: int
  outputs: int
  is_training: bool
  times: int = 1


@dataclasses.dataclass(frozen=True)
class Sketch:
  """The estimates for a step on one device.

  Attributes:
    seconds: time by a roofline model.
    bytes: HBM at the peak.
    least_bytes: HBM that it needs in any case: its arguments and the arrays of the rollout.
  """

  seconds: float
  bytes: float
  least_bytes: float


def sketch(
  config: Config, stage: str, program: programs.Program, mesh: dict[str, int], chip: Chip
) -> Sketch:
  """Estimates a stage's step.

  Args:
    config: the run's config with the `remat` and `ppo.ptx_microbatches` to estimate. Its mesh is not read.
    stage: name of the stage.
    program: the stage's program on this mesh.
    mesh: axis -> number of devices along it.
    chip: rates of the devices.
  """
  passes = make_passes(config, stage)
  inside = {name: programs.shard_bytes(tree) for name, tree in program.inside.items()}
  arguments = programs.shard_bytes(program.arguments)
  decode_steps = config.data.max_response_length - 1 if inside else 0
  # Decoding is limited by memory: every step reads all weights and the whole cache.
  decode = decode_steps * sum(inside.values()) / chip.hbm_rate
  return Sketch(
    seconds=decode + sum(pass_.times * _seconds(pass_, mesh, chip) for pass_ in passes),
    bytes=arguments + max(sum(inside.values()), *(_live_bytes(pass_, mesh) for pass_ in passes)),
    least_bytes=arguments + sum(inside.values()),
  )


def make_passes(config: Config, stage: str) -> list[Pass]:
  """The passes of a stage's step. The decode steps of a rollout are not included."""
  vocab_size, row = config.tokenizer.vocab_size, STAGES[stage]
  # The estimate only depends on `remat`. The layout, for which the mesh would have to be known, is set arbitrarily.
  execution = models.resolve_execution(config.execution, "tpu")
  execution = dataclasses.replace(execution, decode_layout="tensor")
  config = dataclasses.replace(config, execution=execution)
  model = make_model(config, None, row.role, vocab_size)
  model = bare(model) if row.is_base else model
  prompt, response = config.data.max_prompt_length, config.data.max_response_length
  length = prompt + response
  if row.kind == "rm":
    answers = config.rm.batch_size // config.rm.microbatches * config.rm.max_responses
    return [Pass(model, answers, length, length, True, config.rm.microbatches)]
  if row.kind in ("base", "sft"):
    cfg = getattr(config, row.block)
    rows = cfg.batch_size // cfg.microbatches
    return [Pass(model, rows, cfg.length, cfg.length, True, cfg.microbatches)]
  if not row.is_rl:
    raise ValueError(f"stage {stage} of kind {row.kind} has a step of unknown passes")
  policy, scalar = model, make_model(config, None, "reward", vocab_size)
  cfg = lineage.variant(config, stage)
  updates, minibatch = cfg.num_epochs * cfg.num_minibatches, cfg.batch_size // cfg.num_minibatches
  updates, minibatch = updates * cfg.microbatches, minibatch // cfg.microbatches
  scorings = cfg.score_microbatches * (2 if cfg.behaviour_logprob == "rescore" else 1)
  scored = cfg.batch_size // cfg.score_microbatches
  passes = [
    Pass(policy, cfg.batch_size, prompt, 1, False),  # the prefill of the rollout
    # The reference, and perhaps the policy.
    Pass(policy, scored, length, response, False, scorings),
    # The reward model, and the value network if there is one.
    Pass(
      scalar, scored, length, length, False, (1 + cfg.has_value_network) * cfg.score_microbatches
    ),
    Pass(policy, minibatch, length, response, True, updates),
  ]
  if cfg.has_value_network:
    passes.append(Pass(scalar, minibatch, length, response, True, updates))
  if cfg.gamma > 0:
    rows = cfg.batch_size // cfg.num_minibatches * cfg.ptx_rows // cfg.ptx_microbatches
    times = cfg.num_epochs * cfg.num_minibatches * cfg.ptx_microbatches
    passes.append(Pass(policy, rows, cfg.ptx_length, cfg.ptx_length, True, times))
  return passes


@functools.cache
def _sizes(model: transformer.Model) -> tuple[int, int]:
  """The number of weights in the layers, and of those in the tables, which `tensor` does not split."""
  shapes = transformer.param_shapes(model)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  in_layers = count(shapes["layers"])
  return in_layers, count(shapes) - in_layers


def _split(pass_: Pass, mesh: dict[str, int]) -> tuple[int, int, int]:
  """(rows per device, devices along fsdp, devices along tensor)."""
  shards = math.prod(mesh[axis] for axis in sharding.ROWS)
  return -(-pass_.rows // shards), mesh["fsdp"], mesh["tensor"]


def _seconds(pass_: Pass, mesh: dict[str, int], chip: Chip) -> float:
  """The time of a pass by its roofline, which is the largest of the terms for compute, HBM, links and DCN."""
  cfg = pass_.model.network
  rows, fsdp, tensor = _split(pass_, mesh)
  in_layers, in_tables = _sizes(pass_.model)
  recomputes = pass_.is_training and pass_.model.execution.remat == "full"
  tokens, share = rows * pass_.length, (tensor - 1) / tensor

  # Multiplications per token: one for each weight, and in attention one for each pair of positions for the scores and
  # one for the values. The causal mask halves both.
  products = in_layers + cfg.num_layers * pass_.length * cfg.num_heads * cfg.head_dim
  head = rows * pass_.outputs * cfg.d_model / tensor
  head *= pass_.model.vocab_size if pass_.model.head == "lm" else 1
  # A multiplication is two FLOPs. The backward pass takes twice the forward pass, or as much with a frozen base, and
  # full remat repeats the forward pass.
  has_gradient = pass_.is_training and pass_.model.adapter is None
  backward = 2 * pass_.is_training + 2 * has_gradient
  flops = (2 + backward + 2 * recomputes) * tokens * products / tensor
  flops += (2 + backward) * head

  weights = _HALF * (in_layers / tensor + in_tables)
  # Weights are gathered for the forward pass and again for the backward pass.
  uses = 2 if pass_.is_training else 1
  # Gathers, and scattering the gradient.
  moved = weights * (fsdp - 1) / fsdp * (uses + has_gradient)
  # Each device's part of the gradient is then summed over `data`, and over the DCN between slices.
  summed = 2 * weights / fsdp * has_gradient
  across = {axis: summed * (mesh[axis] - 1) / mesh[axis] for axis in ("data", "slice")}
  moved += across["data"]
  sums = 2 * (1 + pass_.is_training + recomputes)  # after attention and after the mlp
  moved += sums * cfg.num_layers * tokens * cfg.d_model * _HALF * 2 * share
  read = uses * weights
  compute, links, hbm = flops / chip.flops, moved / chip.link_rate, read / chip.hbm_rate
  return max(compute, links, hbm, across["slice"] / chip.dcn_rate)


def _live_bytes(pass_: Pass, mesh: dict[str, int]) -> float:
  """The bytes in HBM at the peak of a pass, besides the step's arguments."""
  cfg, remat = pass_.model.network, pass_.model.execution.remat
  rows, fsdp, tensor = _split(pass_, mesh)
  in_layers, in_tables = _sizes(pass_.model)
  tokens = rows * pass_.length
  logits = rows * pass_.outputs / tensor
  logits *= pass_.model.vocab_size if pass_.model.head == "lm" else 1
  # The arrays of one layer. The inputs of its products have whole columns on each device. `tensor` splits the residual
  # stream, norms, branches, heads and hidden units. The scores of attention are not stored.
  split = 4 * cfg.num_heads * cfg.head_dim + 3 * cfg.d_mlp
  layer = tokens * _HALF * (2 * cfg.d_model + (4 * cfg.d_model + split) / tensor)
  # In training, the gradient reuses the memory of the logits. In scoring, there are two copies of the logits, because
  # they are divided by the temperature.
  live = (1 if pass_.is_training else 2) * _FULL * logits + layer
  if pass_.is_training:
    stream = cfg.d_model / tensor  # `tensor` splits its columns
    heads, hidden = cfg.num_heads + cfg.num_kv_heads, cfg.d_mlp * (2 if cfg.is_gated else 1)
    # The sum between the branches, which parallel ones have not, and the outputs of both where they are normalised.
    sums = 0 if cfg.parallel_residual else 3 if cfg.sandwich_norm else 1
    products = sums * stream + (2 * heads * cfg.head_dim + hidden) / tensor
    kept = {"full": stream, "products": stream + products}
    live += cfg.num_layers * (tokens * _HALF * kept[remat] if remat in kept else layer)
    if pass_.model.adapter is None:  # an adapter's are small
      live += (
        2 * _FULL * (in_layers / tensor + in_tables) / fsdp
      )  # the gradient and its running sum
  # The gathered weights of one layer.
  return live + _HALF * (in_layers / cfg.num_layers + in_tables) / tensor
