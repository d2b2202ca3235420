"""Computes the FLOPs of matrix products and attention kernels in a compiled program's text.

A multiplication and its addition count as two FLOPs. Called by costs.py. Imports hlo.py only.
"""

import math
import re

from launch.hlo import Computation, Instruction


def dot_flops(computation: Computation, item: Instruction) -> float:
  """FLOPs of a `dot` instruction."""
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.text)[1]
  left = computation.instructions[item.operands[0]].arrays[0].dims
  depth = math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
  return 2.0 * math.prod(item.arrays[0].dims) * depth


def convolution_flops(computation: Computation, item: Instruction) -> float:
  """FLOPs of a `convolution` instruction.

  The TPU's compiler writes every matrix product as a convolution. It turns batch dimensions into spatial dimensions
  with holes or padding. Only products with real values count, so the holes are left out.
  """
  kernel_labels, output_labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", item.text).groups()
  input_labels = re.search(r"dim_labels=(\w+)_", item.text)[1]
  left, kernel = (computation.instructions[name].arrays[0].dims for name in item.operands[:2])
  output = item.arrays[0].dims
  flops = 2.0 * output[output_labels.index("b")] * output[output_labels.index("f")]
  flops *= kernel[kernel_labels.index("i")]
  for axis in range(len(kernel_labels) - 2):
    label = str(axis)
    flops *= _overlaps(
      left[input_labels.index(label)],
      kernel[kernel_labels.index(label)],
      output[output_labels.index(label)],
      _window(item.text, axis),
    )
  groups = item.integer("batch_group_count") or 1
  return flops / groups


_KERNEL = re.compile(r"/attention_(?:causal|band_(\d+))/.*/splash_mha_(fwd|dq|dkv)_")
# Number of matrix products per block:
#   fwd: the scores, and the weighted sum of values.
#   dq:  the scores, their gradient, and the gradient of the queries.
#   dkv: the scores, and the gradients of the values, of the scores and of the keys.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def is_kernel(item: Instruction) -> bool:
  """Whether this is an attention kernel of instructjax/models/splash.py, which its named scopes show."""
  return item.opcode == "custom-call" and _KERNEL.search(item.op_name) is not None


def attention_flops(computation: Computation, item: Instruction) -> float:
  """FLOPs of an attention kernel; 0 for other instructions.

  The compiler does not know a kernel's FLOPs, so they are computed from its block sizes. The kernel skips blocks that
  are completely masked by causality or by the band. It does not skip blocks that are masked by segments.
  """
  if not is_kernel(item):
    return 0.0
  band, part = _KERNEL.search(item.op_name).groups()
  suffix = "" if part == "fwd" else f"_{part}"
  sides = ("block_q", "block_kv")
  block_q, block_kv = (
    int(re.search(rf'{side}{suffix}\\?": (\d+)', item.text)[1]) for side in sides
  )
  *heads, length, head_dim = computation.instructions[item.operands[2]].arrays[0].dims
  blocks = 0
  for query in range(0, length, block_q):
    # A block of queries attends to the blocks of keys from the band's beginning to its own last position.
    first = max(0, query - int(band) + 1) if band else 0
    blocks += (query + block_q - 1) // block_kv - first // block_kv + 1
  return 2.0 * _PRODUCTS[part] * math.prod(heads) * blocks * block_q * block_kv * head_dim


def _window(text: str, axis: int) -> dict[str, int]:
  """A convolution's stride, low padding and dilations along a spatial axis."""
  match = re.search(r"window=\{([^}]*)\}", text)
  fields = dict(field.split("=") for field in match[1].split()) if match else {}

  def read(name: str, default: int) -> int:
    return int(fields[name].split("x")[axis].split("_")[0]) if name in fields else default

  return {
    "stride": read("stride", 1),
    "pad": read("pad", 0),
    "lhs_dilate": read("lhs_dilate", 1),
    "rhs_dilate": read("rhs_dilate", 1),
  }


def _overlaps(size: int, kernel: int, output: int, window: dict[str, int]) -> int:
  """The number of pairs of output and kernel positions that meet a real value of the input."""
  last, found = (size - 1) * window["lhs_dilate"], 0
  for at in range(kernel):
    offset = at * window["rhs_dilate"] - window["pad"]
    places = (position * window["stride"] + offset for position in range(output))
    found += sum(0 <= place <= last and place % window["lhs_dilate"] == 0 for place in places)
  return found
