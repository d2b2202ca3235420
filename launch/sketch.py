"""Estimates a step's seconds and bytes from its sizes alone, to choose the meshes that are worth compiling.

The estimate is deliberately rough, because it is used for ranking only. It considers matrix products, the gathering of
weights and scattering of gradients over `fsdp`, the summing of activations over `tensor`, and the data that a decode
step reads. It ignores latency, layouts and overlap. Called by search.py and whole_run.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax

from instructjax import models
from instructjax.core.config import Config, PPOConfig
from instructjax.core.stages import STAGES
from instructjax.models import flops, transformer
from instructjax.parallel import sharding
from instructjax.stages import lineage
from instructjax.stages.context import bare, make_model
from launch import lengths, programs
from launch.lengths import BOUND, Means
from launch.topology import Chip

_HALF, _FULL = 2, 4  # bytes of a bfloat16 and of a float32


@dataclasses.dataclass(frozen=True)
class Pass:
  """A forward pass in a step, with or without a backward pass.

  Attributes:
    part: the part of an iteration that it belongs to: prefill, scoring or update.
    model: the network.
    rows, length: shape of its tokens, for all devices together.
    outputs: number of columns for which the head is computed.
    is_training: whether there is a backward pass.
    times: number of times per step.
  """

  part: str
  model: transformer.Model
  rows: int
  length: int
  outputs: int
  is_training: bool
  times: float = 1

  @property
  def flops(self) -> float:
    """FLOPs of its products, for all devices and all times together; with full remat the forward pass counts twice."""
    tokens, outputs = self.rows * self.length, self.rows * self.outputs
    recomputes = self.is_training and self.model.execution.remat == "full"
    total = 0.0
    if self.is_training:
      total = flops.training(self.model, tokens, self.length, outputs)
    if recomputes or not self.is_training:
      total += flops.forward(self.model, tokens, self.length, outputs)
    return self.times * total


@dataclasses.dataclass(frozen=True)
class Sketch:
  """The estimates for a step on one device.

  Attributes:
    seconds: time by a roofline model.
    decode: of it, decoding.
    decode_bytes: bytes of HBM that all decode steps read.
    decode_links: seconds that all decode steps would send, with nothing else to do.
    links: part -> seconds that its passes would send, with nothing else to do.
    bytes: HBM at the peak.
    least_bytes: HBM that it needs in any case: its arguments and the arrays of the rollout.
  """

  seconds: float
  bytes: float
  least_bytes: float
  decode: float
  decode_bytes: float
  decode_links: float
  links: dict[str, float]


def sketch(
  config: Config,
  stage: str,
  program: programs.Program,
  mesh: Mapping[str, int],
  chip: Chip,
  means: Means = BOUND,
) -> Sketch:
  """Estimates a stage's step.

  Args:
    config: the run's config with the `remat` and `ppo.ptx_microbatches` to estimate. Its mesh is not read.
    stage: name of the stage.
    program: the stage's program on this mesh.
    mesh: axis -> number of devices along it.
    chip: rates of the devices.
    means: lengths of prompts and answers.
  """
  shards = math.prod(mesh[axis] for axis in sharding.ROWS)
  work = work_of(config, stage, shards, means)
  passes = make_passes(config, stage, shards, means)
  inside = {name: programs.shard_bytes(tree) for name, tree in program.inside.items()}
  arguments = programs.shard_bytes(program.arguments)
  # Decoding is limited by memory: every step reads all weights and the whole cache of the rows in it.
  read = 0.0
  if work is not None:
    most = max(work.steps)
    copy, cache = inside["bf16 rollout copy"], inside["KV cache"]
    read = sum(steps * (copy + cache * rows / most) for rows, steps in work.steps.items())
  sent = 0.0
  if work is not None:
    of_layout = functools.partial(_decode_sends, passes[0].model, program.decode_layout, mesh)
    sent = sum(steps * of_layout(rows) for rows, steps in work.steps.items()) / chip.link_rate
  decode = max(read / chip.hbm_rate, sent)
  links = dict.fromkeys((one.part for one in passes), 0.0)
  for one in passes:
    links[one.part] += one.times * _terms(one, mesh, chip)["links"]
  return Sketch(
    seconds=decode + sum(one.times * _seconds(one, mesh, chip) for one in passes),
    bytes=arguments + max(sum(inside.values()), *(_live_bytes(pass_, mesh) for pass_ in passes)),
    least_bytes=arguments + sum(inside.values()),
    decode=decode,
    decode_bytes=read,
    decode_links=sent,
    links=links,
  )


def _decode_sends(
  model: transformer.Model, layout: str | None, mesh: Mapping[str, int], rows: int
) -> float:
  """The bytes that a device sends in a decode step with so many rows, in all layers."""
  cfg = model.network
  fsdp, tensor = mesh["fsdp"], mesh["tensor"]
  own = rows / math.prod(mesh[axis] for axis in sharding.ROWS)
  # After attention and after the mlp, the activations of a device's rows are summed over `tensor`.
  sent = 2 * 2 * (tensor - 1) / tensor * own * cfg.d_model
  if layout == "2d":
    # What is multiplied with weights that `fsdp` splits is summed over it, for the rows of all of its devices.
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    hidden = cfg.d_mlp * (2 if cfg.is_gated else 1)
    sent += 2 * (fsdp - 1) / fsdp * own * fsdp * (heads + hidden) / tensor
  return _HALF * cfg.num_layers * sent


def work_of(config: Config, stage: str, shards: int, means: Means) -> lengths.Work | None:
  """What the lengths of prompts and answers make of an iteration of RL; None for other stages."""
  if not STAGES[stage].is_rl:
    return None
  return lengths.work(config, lineage.variant(config, stage), shards, means)


def make_passes(config: Config, stage: str, shards: int, means: Means = BOUND) -> list[Pass]:
  """The passes of a stage's step. The decode steps of a rollout are not included."""
  vocab_size, row = config.tokenizer.vocab_size, STAGES[stage]
  # The estimate only depends on `remat`. The layout, for which the mesh would have to be known, is set arbitrarily.
  execution = models.resolve_execution(config.execution, "tpu")
  execution = dataclasses.replace(execution, decode_layout="tensor")
  config = dataclasses.replace(config, execution=execution)
  model = make_model(config, None, row.require_role(), vocab_size)
  model = bare(model) if row.is_base else model
  if row.kind == "rm":
    rows, length = programs.ranked_rows(config, shards, means)
    parts = config.rm.microbatches
    return [Pass("update", model, rows // parts, length, length, True, parts)]
  if row.kind in ("base", "sft"):
    cfg = getattr(config, row.block)
    rows = cfg.batch_size // cfg.microbatches
    return [Pass("update", model, rows, cfg.length, cfg.length, True, cfg.microbatches)]
  if not row.is_rl:
    raise ValueError(f"stage {stage} of kind {row.kind} has a step of unknown passes")
  work = work_of(config, stage, shards, means)
  scalar = make_model(config, None, "reward", vocab_size)
  return _rl_passes(config, lineage.variant(config, stage), model, scalar, work)


def _rl_passes(config: Config, cfg: PPOConfig, policy, scalar, work: lengths.Work) -> list[Pass]:
  """The passes of an iteration of RL, with episodes in rows of their own or several in a row."""
  prompt, response = config.data.max_prompt_length, config.data.max_response_length
  length, updates = prompt + response, cfg.num_epochs * cfg.num_minibatches
  minibatch = cfg.batch_size // cfg.num_minibatches
  # (rows, columns, columns with an output, times)
  scored = [(cfg.batch_size // cfg.score_microbatches, length, response, cfg.score_microbatches)]
  trained = [(minibatch // cfg.microbatches, length, response, updates * cfg.microbatches)]
  if work.scored is not None and work.trained is not None:
    chunk = lambda width: (cfg.packed_rows * length // width, width, width - 1)
    scored = [(*chunk(width), number) for width, number in work.scored.items()]
    trained = [(*chunk(width), updates * number) for width, number in work.trained.items()]
  rows, prefills = work.prefills
  passes = [Pass("prefill", policy, rows, prompt, 1, False, prefills)]
  # The reference, and perhaps the policy. The reward models, and the value network if there is one.
  policies = 2 if cfg.behaviour_logprob == "rescore" else 1
  scalars = 1 + len(cfg.ensemble) + cfg.has_value_network
  for rows, width, outputs, times in scored:
    passes.append(Pass("scoring", policy, rows, width, outputs, False, policies * times))
    passes.append(Pass("scoring", scalar, rows, width, width, False, scalars * times))
  for rows, width, outputs, times in trained:
    passes.append(Pass("update", policy, rows, width, outputs, True, times))
    if cfg.has_value_network:
      passes.append(Pass("update", scalar, rows, width, outputs, True, times))
  if cfg.gamma > 0:
    rows = minibatch * cfg.ptx_rows // cfg.ptx_microbatches
    times = updates * cfg.ptx_microbatches
    passes.append(Pass("update", policy, rows, cfg.ptx_length, cfg.ptx_length, True, times))
  return [one for one in passes if one.times]


@functools.cache
def _sizes(model: transformer.Model) -> tuple[int, int]:
  """The number of weights in the layers, and of those in the tables, which `tensor` does not split."""
  shapes = transformer.param_shapes(model)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  in_layers = count(shapes["layers"])
  return in_layers, count(shapes) - in_layers


def _split(pass_: Pass, mesh: Mapping[str, int]) -> tuple[int, int, int]:
  """(rows per device, devices along fsdp, devices along tensor)."""
  shards = math.prod(mesh[axis] for axis in sharding.ROWS)
  return -(-pass_.rows // shards), mesh["fsdp"], mesh["tensor"]


def _seconds(pass_: Pass, mesh: Mapping[str, int], chip: Chip) -> float:
  """The time of a pass by its roofline, which is the largest of the terms for compute, HBM, links and DCN."""
  return max(_terms(pass_, mesh, chip).values())


def _terms(pass_: Pass, mesh: Mapping[str, int], chip: Chip) -> dict[str, float]:
  """The seconds that each term of a pass's roofline would take alone."""
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
  count = (2 + backward + 2 * recomputes) * tokens * products / tensor
  count += (2 + backward) * head

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
  return {
    "compute": count / chip.flops,
    "links": moved / chip.link_rate,
    "HBM": read / chip.hbm_rate,
    "DCN": across["slice"] / chip.dcn_rate,
  }


def _live_bytes(pass_: Pass, mesh: Mapping[str, int]) -> float:
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
