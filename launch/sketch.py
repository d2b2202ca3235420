"""A step's seconds and bytes from its sizes alone, to say which meshes are worth a compile. Called by search.py.

Coarse on purpose: it ranks, the compiler decides. It knows matrix products, weights gathered and gradients scattered
over `fsdp`, activations summed over `tensor`, and what a decode step reads; not latency, layouts or overlap.
"""

import dataclasses
import functools
import math

import jax

from instructjax import models
from instructjax.core.config import Config
from instructjax.models import transformer
from instructjax.parallel import sharding
from launch import programs
from launch.topology import Chip

_HALF, _FULL = 2, 4  # bytes of bfloat16 and float32


@dataclasses.dataclass(frozen=True)
class Pass:
  """One forward pass, or forward and backward, that a step makes.

  Attributes:
    model: whose weights.
    rows, length: of its tokens, all devices together.
    outputs: columns of a row that the head runs on.
    is_training: whether there is a backward pass.
    times: how often in a step.
  """

  model: transformer.Model
  rows: int
  length: int
  outputs: int
  is_training: bool
  times: int = 1


@dataclasses.dataclass(frozen=True)
class Sketch:
  """What a step is estimated to take on one device.

  Attributes:
    seconds: by a roofline.
    bytes: of HBM.
    least_bytes: that it surely takes: its arguments and what a rollout holds.
  """

  seconds: float
  bytes: float
  least_bytes: float


def sketch(
  config: Config, stage: str, program: programs.Program, mesh: dict[str, int], chip: Chip
) -> Sketch:
  """Estimates a stage's step.

  Args:
    config: its meshes are not read; `remat` and `ppo.ptx_chunks` are.
    program: of the stage on this mesh.
    mesh: axis -> devices along it.
  """
  passes = make_passes(config, stage)
  inside = {name: programs.shard_bytes(tree) for name, tree in program.inside.items()}
  arguments = programs.shard_bytes(program.arguments)
  decode_steps = config.data.max_response_length - 1 if inside else 0
  decode = decode_steps * sum(inside.values()) / chip.hbm_rate
  return Sketch(
    seconds=decode + sum(pass_.times * _seconds(pass_, mesh, chip) for pass_ in passes),
    bytes=arguments + max(sum(inside.values()), *(_live_bytes(pass_, mesh) for pass_ in passes)),
    least_bytes=arguments + sum(inside.values()),
  )


def make_passes(config: Config, stage: str) -> list[Pass]:
  """The passes of a stage's step; a rollout's decode steps are none of them."""
  vocab_size = config.tokenizer.vocab_size
  # Of the execution only `remat` is read: the mesh, which decides the rest, is not known here.
  execution = models.resolve_execution(config.execution, "tpu")
  execution = dataclasses.replace(execution, decode_layout="tensor")
  describe = lambda cfg, head: models.make_model(cfg.network, execution, vocab_size, head)
  policy, scalar = describe(config.model, "lm"), describe(config.reward_model, "scalar")
  prompt, response = config.data.max_prompt_length, config.data.max_response_length
  length = prompt + response
  if stage == "rm":
    return [Pass(scalar, config.rm.batch_size * config.rm.max_responses, length, length, True)]
  if stage not in ("ppo", "ppo_ptx"):
    cfg = getattr(config, stage)
    if stage == "reward_pretrain":
      policy = describe(config.reward_model, "lm")
    return [Pass(policy, cfg.batch_size, cfg.length, cfg.length, True)]
  cfg = config.ppo
  updates, minibatch = cfg.num_epochs * cfg.num_minibatches, cfg.batch_size // cfg.num_minibatches
  scorings = 2 if cfg.behaviour_logprob == "rescore" else 1
  passes = [
    Pass(policy, cfg.batch_size, prompt, 1, False),
    Pass(policy, cfg.batch_size, length, response, False, scorings),
    Pass(scalar, cfg.batch_size, length, length, False, 2),
    Pass(policy, minibatch, length, response, True, updates),
    Pass(scalar, minibatch, length, response, True, updates),
  ]
  if stage == "ppo_ptx" and cfg.gamma > 0:
    rows = minibatch * cfg.ptx_rows // cfg.ptx_chunks
    times = updates * cfg.ptx_chunks
    passes.append(Pass(policy, rows, cfg.ptx_length, cfg.ptx_length, True, times))
  return passes


@functools.cache
def _sizes(model: transformer.Model) -> tuple[int, int]:
  """(Weights in the layers, weights in the tables that `tensor` does not split)."""
  shapes = transformer.param_shapes(model)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  in_layers = count(shapes["layers"])
  return in_layers, count(shapes) - in_layers


def _split(pass_: Pass, mesh: dict[str, int]) -> tuple[int, int, int]:
  """(Rows of a device, devices along fsdp, devices along tensor)."""
  shards = math.prod(mesh[axis] for axis in sharding.ROWS)
  return -(-pass_.rows // shards), mesh["fsdp"], mesh["tensor"]


def _seconds(pass_: Pass, mesh: dict[str, int], chip: Chip) -> float:
  """The largest term of a pass's roofline."""
  cfg = pass_.model.network
  rows, fsdp, tensor = _split(pass_, mesh)
  in_layers, in_tables = _sizes(pass_.model)
  recomputes = pass_.is_training and pass_.model.execution.remat == "full"
  tokens, share = rows * pass_.length, (tensor - 1) / tensor

  products = in_layers + cfg.num_layers * pass_.length * cfg.num_heads * cfg.head_dim
  head = rows * pass_.outputs * cfg.d_model / tensor
  head *= pass_.model.vocab_size if pass_.model.head == "lm" else 1
  flops = (2 + 4 * pass_.is_training + 2 * recomputes) * tokens * products / tensor
  flops += (2 + 4 * pass_.is_training) * head

  weights = _HALF * (in_layers / tensor + in_tables)
  uses = 2 if pass_.is_training else 1  # forward, and anew for the backward pass
  moved = weights * (fsdp - 1) / fsdp * (uses + pass_.is_training)  # the gradient is scattered
  # What fsdp has scattered is summed over `data`, and over DCN between slices.
  summed = 2 * weights / fsdp * pass_.is_training
  across = {axis: summed * (mesh[axis] - 1) / mesh[axis] for axis in ("data", "slice")}
  moved += across["data"]
  sums = 2 * (1 + pass_.is_training + recomputes)  # after attention and after the mlp
  moved += sums * cfg.num_layers * tokens * cfg.d_model * _HALF * 2 * share
  read = uses * weights
  compute, links, hbm = flops / chip.flops, moved / chip.link_rate, read / chip.hbm_rate
  return max(compute, links, hbm, across["slice"] / chip.dcn_rate)


def _live_bytes(pass_: Pass, mesh: dict[str, int]) -> float:
  """What lies in HBM at a pass's peak besides the step's arguments."""
  cfg, remat = pass_.model.network, pass_.model.execution.remat
  rows, fsdp, tensor = _split(pass_, mesh)
  in_layers, in_tables = _sizes(pass_.model)
  tokens = rows * pass_.length
  logits = rows * pass_.outputs / tensor
  logits *= pass_.model.vocab_size if pass_.model.head == "lm" else 1
  # One layer's arrays: whole columns of what meets the weights; the residual stream, norms and branches, heads and
  # hidden units, which `tensor` splits; no scores of attention.
  split = 4 * cfg.num_heads * cfg.head_dim + 3 * cfg.d_mlp
  layer = tokens * _HALF * (2 * cfg.d_model + (4 * cfg.d_model + split) / tensor)
  # In training the gradient takes the logits' place; in scoring they lie there twice, as the temperature divides them.
  live = (1 if pass_.is_training else 2) * _FULL * logits + layer
  if pass_.is_training:
    stream = cfg.d_model / tensor  # its columns are split
    heads, hidden = cfg.num_heads + cfg.num_kv_heads, cfg.d_mlp * (1 if cfg.mlp == "gelu" else 2)
    products = stream + (2 * heads * cfg.head_dim + hidden) / tensor
    kept = {"full": stream, "products": stream + products}
    live += cfg.num_layers * (tokens * _HALF * kept[remat] if remat in kept else layer)
    live += 2 * _FULL * (in_layers / tensor + in_tables) / fsdp  # gradient and its sum
  return live + _HALF * (in_layers / cfg.num_layers + in_tables) / tensor  # gathered
