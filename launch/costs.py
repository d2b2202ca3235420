"""What one run of a compiled TPU program costs a device: FLOPs, bytes of HBM, bytes sent. Called by plan.py.

Everything is multiplied by the trip counts of the loops around it and filed under the part of the iteration it belongs
to, by `jax.named_scope`. Imports hlo.py only.
"""

import collections
import dataclasses
import functools
import math
import re

from launch import hlo
from launch.flops import attention_flops, convolution_flops, dot_flops, is_kernel
from launch.hlo import Computation, Instruction, Module

# Scope -> phase; what a step does outside of these (optimisers, averages, metrics) is its update.
_PHASES = (
  (re.compile(r"/rollout(/|$)"), "rollout"),
  (re.compile(r"/(score|advantages)(/|$)"), "scoring"),
)
PHASES = ("rollout", "scoring", "update")

_COLLECTIVES = {
  "all-gather": "all-gather",
  "all-gather-start": "all-gather",
  "all-reduce": "all-reduce",
  "all-reduce-start": "all-reduce",
  "reduce-scatter": "reduce-scatter",
  "all-to-all": "all-to-all",
  "collective-permute": "collective-permute",
  "collective-permute-start": "collective-permute",
  "collective-broadcast": "collective-broadcast",
}
# What moves no data by itself, or is counted where it starts.
_FREE = {
  *(
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "while",
    "conditional",
    "call",
  ),
  *("copy-done", "slice-done", "all-gather-done", "all-reduce-done", "collective-permute-done"),
  *("partition-id", "replica-id", "after-all", "opt-barrier", "custom-call", "iota"),
  *("recv", "send-done"),
}
# A collective between slices, in the attributes of the send that stands for it.
_MEGASCALE = re.compile(
  r'rendezvous="(?P<name>[^"]*)".*_xla_megascale_transfer_type="(?P<kind>[A-Z_]+)"'
)
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


@dataclasses.dataclass
class Cost:
  """Of one device, in one iteration.

  Attributes:
    flops: of matrix products.
    kernel_flops: of them, those of attention kernels, by formula.
    hbm_bytes: read and written by instructions, each reading its operands and writing its result once.
    wire_bytes: sent to other devices of its slice, by rings.
    dcn_bytes: sent to other slices, by rings, over the data centre's network.
    cycles: libtpu's own estimate; collectives, copies and kernels have none.
  """

  flops: float = 0.0
  kernel_flops: float = 0.0
  hbm_bytes: float = 0.0
  wire_bytes: float = 0.0
  dcn_bytes: float = 0.0
  cycles: float = 0.0

  def __iadd__(self, other: "Cost"):
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
    return self


@dataclasses.dataclass
class Loop:
  """An outermost loop, its inner ones included: what it costs in all `trips`, None if they are not known."""

  phase: str
  trips: int | None
  cost: Cost


@dataclasses.dataclass
class Summary:
  """A program's costs.

  Attributes:
    phases: phase -> Cost.
    collectives: (kind, op_name) -> (how many run, bytes sent).
    loops: the outermost ones, by instruction name.
    unknown_trips: op_names of loops counted once because their length cannot be read.
    host_transfers: instructions that talk to the host.
  """

  phases: dict[str, Cost]
  collectives: dict[tuple[str, str], tuple[float, float]]
  loops: dict[str, Loop]
  unknown_trips: list[str]
  host_transfers: list[str]

  @property
  def by_kind(self) -> dict[str, tuple[float, float]]:
    """Kind of collective -> (how many run, bytes sent)."""
    result = collections.defaultdict(lambda: (0.0, 0.0))
    for (kind, _), added in self.collectives.items():
      result[kind] = tuple(map(sum, zip(result[kind], added)))
    return dict(result)

  @property
  def total(self) -> Cost:
    total = Cost()
    for cost in self.phases.values():
      total += cost
    return total


def summarise(text: str, num_devices: int, num_slices: int = 1) -> Summary:
  """Costs of a compiled program, `compiled.as_text()`."""
  counter = _Counter(hlo.parse(text), num_devices, num_slices)
  counter.visit(counter.module.entry, 1.0, "update", None)
  return Summary(
    phases=counter.phases,
    collectives=dict(counter.collectives),
    loops=counter.loops,
    unknown_trips=sorted(set(counter.unknown_trips)),
    host_transfers=host_transfers(counter.module),
  )


def host_transfers(module: Module) -> list[str]:
  """Names of instructions that send to the host or fetch from it, or keep an array in its memory.

  Between slices, collectives look like host transfers too, but say that the multi-slice runtime handles them.
  """
  found = []
  for computation in module.computations.values():
    for item in computation.instructions.values():
      is_sent = "is_host_transfer=true" in item.text and "xla_megascale_runtime" not in item.text
      is_fed = item.opcode in ("infeed", "outfeed") or any(a.space == 5 for a in item.arrays)
      if is_sent or is_fed:
        found.append(item.name)
  return found


class _Counter:
  """One walk over a module, from the entry into loops, branches and fusions."""

  def __init__(self, module: Module, num_devices: int, num_slices: int):
    self.module, self.num_devices, self.num_slices = module, num_devices, num_slices
    self.phases = {phase: Cost() for phase in PHASES}
    self.collectives = collections.defaultdict(lambda: (0.0, 0.0))
    self.loops: dict[str, Loop] = {}
    self.unknown_trips: list[str] = []
    self._fused = {
      item.called["calls"]
      for computation in module.computations.values()
      for item in computation.instructions.values()
      if item.opcode == "fusion"
    }
    # An asynchronous collective is printed where it starts, in what runs meanwhile and where it ends.
    self._started = {
      _channel(item)
      for computation in module.computations.values()
      if _starts(computation)
      for item in computation.instructions.values()
      if item.opcode in _COLLECTIVES
    }

  def visit(self, computation: Computation, times: float, phase: str, loop: Loop | None):
    """Adds a computation's instructions, each run `times`.

    Args:
      phase: of what calls it, for instructions that say nothing of their own.
      loop: the outermost one around.
    """
    for item in computation.instructions.values():
      own = _phase(computation, item.name) or phase
      if item.opcode == "while":
        self._visit_loop(computation, item, times, own, loop)
        continue
      for name in item.branches if item.opcode == "conditional" else ():
        self.visit(self.module.computations[name], times, own, loop)
      if item.opcode == "call":
        self.visit(self.module.computations[item.called["to_apply"]], times, own, loop)
      kernel_flops = attention_flops(computation, item)
      cost = Cost(
        flops=times * (self._flops(computation, item) + kernel_flops),
        kernel_flops=times * kernel_flops,
        hbm_bytes=times * self._hbm_bytes(computation, item),
        wire_bytes=self._wire_bytes(computation, item, times),
        dcn_bytes=self._dcn_bytes(computation, item, times),
        cycles=times * _cycles(item),
      )
      self.phases[own] += cost
      if loop is not None:
        loop.cost += cost

  def _visit_loop(self, computation, item: Instruction, times, phase: str, loop: Loop | None):
    trips = hlo.trip_count(self.module, computation, item)
    if trips is None:
      self.unknown_trips.append(item.op_name or item.name)
    if loop is None:
      loop = self.loops[item.name] = Loop(phase, trips, Cost())
    inner_times = times * (1 if trips is None else trips)
    for attribute in ("body", "condition"):
      self.visit(self.module.computations[item.called[attribute]], inner_times, phase, loop)

  def _flops(self, computation: Computation, item: Instruction) -> float:
    if item.opcode == "convolution":
      return convolution_flops(computation, item)
    if item.opcode == "dot":
      return dot_flops(computation, item)
    if item.opcode == "fusion":
      inner = self.module.computations[item.called["calls"]]
      return sum(self._flops(inner, other) for other in inner.instructions.values())
    return 0.0

  def _hbm_bytes(self, computation: Computation, item: Instruction) -> float:
    """Operands read and results written that lie in HBM; of what is only sliced, or updated in place, the slice."""
    if is_kernel(item):
      arrays = [array for name in item.operands for array in computation.instructions[name].arrays]
      return float(sum(array.bytes for array in (*arrays, *item.arrays) if array.space == 0))
    if item.opcode in _FREE:
      return 0.0
    if item.opcode in ("copy-start", "slice-start"):
      # A prefetch: its result is (destination, source, ...), or for a slice the other way round.
      moved = min(item.arrays[:2], key=lambda array: array.bytes).bytes
      return float(moved * sum(array.space == 0 for array in item.arrays[:2]))
    if item.opcode == "fusion":
      inner = self.module.computations[item.called["calls"]]
      read = [self._read(inner, index) for index in range(len(item.operands))]
      written = self._written(inner)
    else:
      read = [_sliced(item, index) for index in range(len(item.operands))]
      written = [0.0 if item.opcode == "send" else _updated(computation, item)]
    total = 0.0
    for name, part in zip(item.operands, read):
      arrays = computation.instructions[name].arrays
      if len(arrays) == 1 and arrays[0].space == 0:
        total += arrays[0].bytes if part is None else min(part, arrays[0].bytes)
    for array, part in zip(item.arrays, written):
      if array.space == 0:
        total += array.bytes if part is None else min(part, array.bytes)
    return total

  @functools.cache
  def _read(self, inner: Computation, index: int) -> float | None:
    """Bytes that a fusion reads of an operand, None for all of it."""
    total, pending = 0.0, [inner.parameters[index].name]
    while pending:
      name = pending.pop()
      for user in inner.users[name]:
        position = user.operands.index(name)
        if user.opcode == "bitcast":
          pending.append(user.name)
          continue
        if user.opcode == "tuple" or self._is_repeat(inner, user):
          continue  # handed on
        if user.opcode == "fusion":
          nested = self.module.computations[user.called["calls"]]
          if _unwrapped(nested, nested.root.name) is nested.parameters[position]:
            pending.append(user.name)  # another view of it
            continue
          part = self._read(nested, position)
        else:
          part = _sliced(user, position)
        if part is None:
          return None
        total += part
    return total

  def _written(self, inner: Computation) -> list[float | None]:
    """Bytes that a fusion writes of each result, None for all of it."""
    if _starts(inner):
      return [0.0, None]  # the operand handed on, and where the result will be
    root = inner.root
    result = []
    for name in root.operands if root.opcode == "tuple" else (root.name,):
      item = _unwrapped(inner, name)
      if item.opcode == "fusion":
        result += self._written(self.module.computations[item.called["calls"]])
      elif item.opcode == "parameter" or "AsyncCollectiveDone" in item.text:
        result.append(0.0)
      else:
        result.append(0.0 if self._is_repeat(inner, item) else _updated(inner, item))
    return result

  def _is_repeat(self, computation: Computation, item: Instruction) -> bool:
    """Whether this is an asynchronous collective printed again, after its start."""
    if computation.name not in self._fused or _starts(computation) or _scatters(computation):
      return False
    return item.opcode in _COLLECTIVES and _channel(item) in self._started

  def _wire_bytes(self, computation, item: Instruction, times: float, use: str = "") -> float:
    """Bytes sent by an instruction's collective, or by those inside its fusion `use`; files them by kind and name."""
    if item.opcode == "fusion":
      inner = self.module.computations[item.called["calls"]]
      items = inner.instructions.values()
      return sum(self._wire_bytes(inner, other, times, item.op_name) for other in items)
    kind = _COLLECTIVES.get(item.opcode)
    if kind is None or self._is_repeat(computation, item):
      return 0.0
    if _scatters(computation):
      kind = "reduce-scatter"
    group = group_size(item.text, self.num_devices)
    return self._file(kind, item.op_name or use, times, _ring_bytes(kind, item, computation, group))

  def _dcn_bytes(self, computation: Computation, item: Instruction, times: float) -> float:
    """Bytes sent to other slices. Such a collective is a send to the host, whose runtime does the rest."""
    if item.opcode != "send" or not (match := _MEGASCALE.search(item.text)):
      return 0.0
    kind = match["kind"].lower().replace("_", "-")
    sent = _ring_bytes(kind, item, computation, self.num_slices)
    return self._file(f"DCN {kind}", match["name"], times, sent)

  def _file(self, kind: str, name: str, times: float, sent: float) -> float:
    """Notes a collective that runs `times` and sends so much each time; returns what it sends in all."""
    count, total = self.collectives[kind, name]
    self.collectives[kind, name] = count + times, total + times * sent
    return times * sent


def _unwrapped(computation: Computation, name: str) -> Instruction:
  """The instruction whose result this one, a bitcast perhaps, is a view of."""
  item = computation.instructions[name]
  while item.opcode == "bitcast":
    item = computation.instructions[item.operands[0]]
  return item


def _channel(item: Instruction) -> tuple:
  return item.opcode, item.integer("channel_id")


def _scatters(computation: Computation) -> bool:
  """So the TPU's compiler spells a reduce-scatter: an all-reduce of which a slice is kept."""
  return "all-reduce-scatter" in computation.name


def _starts(computation: Computation) -> bool:
  return "AsyncCollectiveStart" in computation.root.text


def _phase(computation: Computation, name: str) -> str | None:
  """Phase of an instruction by its own name, or where that says nothing by that of what uses it."""
  seen, pending = {name}, [name]
  while pending:
    item = computation.instructions[pending.pop(0)]
    if item.op_name.startswith("jit("):
      return next((phase for scope, phase in _PHASES if scope.search(item.op_name)), "update")
    for user in computation.users[item.name]:
      if user.name not in seen and user.opcode != "while":
        seen.add(user.name)
        pending.append(user.name)
  return None


def _cycles(item: Instruction) -> float:
  match = re.search(r'"estimated_cycles":"(\d+)"', item.text)
  return float(match[1]) if match else 0.0


def _sliced(item: Instruction, index: int) -> float | None:
  """Bytes that an instruction reads of an operand, None for all of it."""
  if item.opcode in _SLICES and index == 0:
    return float(item.arrays[0].bytes)
  if item.opcode in ("dynamic-update-slice", "scatter") and index == 0:
    return 0.0  # in place
  return None


def _updated(computation: Computation, item: Instruction) -> float | None:
  """Bytes that an instruction writes of its result, None for all of it."""
  if item.opcode == "dynamic-update-slice":
    return float(computation.instructions[item.operands[1]].arrays[0].bytes)
  return None


def _ring_bytes(kind: str, item: Instruction, computation: Computation, group: int) -> float:
  """Bytes that one device sends in a collective of `group` devices, by the usual ring algorithms."""
  operands = sum(
    array.bytes for name in item.operands for array in computation.instructions[name].arrays
  )
  share = (group - 1) / group
  if kind == "all-gather":
    return operands * (group - 1)
  if kind == "all-reduce":
    return 2 * operands * share
  if kind in ("reduce-scatter", "all-to-all"):
    return operands * share
  return float(operands)


def group_size(text: str, num_devices: int) -> int:
  """Devices that take part in a collective together; its replica groups are spelt in three ways."""
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
    return int(match[2])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(match[1].split(","))
  return num_devices
