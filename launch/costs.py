"""Computes what one run of a compiled TPU program costs each device: FLOPs, HBM traffic and bytes sent.

The cost of each instruction is multiplied by the trip counts of the loops around it. It is attributed to a phase of the
iteration by the name of its `jax.named_scope`. Called by planning.py. Imports hlo.py and flops.py only.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

from launch import hlo
from launch.flops import attention_flops, convolution_flops, dot_flops, is_kernel
from launch.hlo import Computation, Instruction, Module

# Scope -> phase. Everything outside these scopes (losses, optimisers, averages, metrics) counts as the update.
_PHASES = (
  (re.compile(r"/rollout(/|$)"), "rollout"),
  (re.compile(r"/(score|advantages)(/|$)"), "scoring"),
)
PHASES = ("rollout", "scoring", "update")
# The loops of decode steps, of which there are several if slots become fewer.
DECODE = re.compile(r"/decode(_\d+)?/while$")

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
# Instructions that move no data themselves, and the ends of asynchronous operations, which are counted at their starts.
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
# The compiler turns a collective between slices into a send, whose attributes describe the collective.
_MEGASCALE = re.compile(
  r'rendezvous="(?P<name>[^"]*)".*_xla_megascale_transfer_type="(?P<kind>[A-Z_]+)"'
)
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


@dataclasses.dataclass
class Cost:
  """The cost of an iteration, or a part of it, for one device.

  Attributes:
    flops: FLOPs of matrix products, including those of attention kernels.
    kernel_flops: FLOPs of attention kernels alone, computed by a formula.
    hbm_bytes: bytes read from and written to HBM, if each instruction reads its operands and writes its result once.
    wire_bytes: bytes sent to other devices in the same slice, assuming ring algorithms.
    dcn_bytes: bytes sent to other slices over the data centre's network, assuming ring algorithms.
    cycles: libtpu's estimate of the clock cycles. It has none for collectives, copies and kernels.
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
  """An outermost loop, or a loop of decode steps, whose costs are then not those of the loops around it.

  Attributes:
    phase: phase of the iteration that it belongs to.
    trips: number of times that it runs; None if this is not known.
    cost: cost of all trips, including inner loops.
    op_name: JAX's name of it; '' if there is none.
  """

  phase: str
  trips: float | None
  cost: Cost
  op_name: str = ""


@dataclasses.dataclass
class Summary:
  """The costs of a program.

  Attributes:
    phases: phase -> Cost.
    collectives: (kind, op_name) -> (number of times that it runs, bytes sent).
    loops: instruction name -> outermost loop, or loop of decode steps.
    unknown_trips: op_names of loops that are counted once, because their length cannot be read.
    host_transfers: names of instructions that communicate with the host.
  """

  phases: dict[str, Cost]
  collectives: dict[tuple[str, str], tuple[float, float]]
  loops: dict[str, Loop]
  unknown_trips: list[str]
  host_transfers: list[str]

  @property
  def by_kind(self) -> dict[str, tuple[float, float]]:
    """Kind of collective -> (number of times that it runs, bytes sent)."""
    result = collections.defaultdict(lambda: (0.0, 0.0))
    for (kind, _), added in self.collectives.items():
      result[kind] = tuple(map(sum, zip(result[kind], added)))
    return dict(result)


def summarise(
  text: str,
  num_devices: int,
  num_slices: int = 1,
  turns: Callable[[str], float | None] = lambda op_name: None,
) -> Summary:
  """Computes the costs of a compiled program.

  Args:
    text: the program, from `compiled.as_text()`.
    num_devices: number of devices of the mesh.
    num_slices: number of slices that the devices form.
    turns: op_name of a loop -> how often it runs each time that it is entered, if its own condition does not say so;
      None for all others.
  Raises:
    ValueError: the text is not a compiled program.
  """
  counter = _Counter(hlo.parse(text), num_devices, num_slices, turns)
  counter.visit(counter.module.entry, 1.0, "update", None)
  return Summary(
    phases=counter.phases,
    collectives=dict(counter.collectives),
    loops=counter.loops,
    unknown_trips=sorted(set(counter.unknown_trips)),
    host_transfers=host_transfers(counter.module),
  )


def host_transfers(module: Module) -> list[str]:
  """Names of instructions that exchange data with the host or keep an array in its memory.

  Collectives between slices look like host transfers too. They are left out; their text names the multi-slice runtime.
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
  """Adds up costs in one walk over a module, from its entry into loops, branches and fusions."""

  def __init__(
    self,
    module: Module,
    num_devices: int,
    num_slices: int,
    turns: Callable[[str], float | None],
  ):
    self.module, self.num_devices, self.num_slices = module, num_devices, num_slices
    self.turns = turns
    self.phases = {phase: Cost() for phase in PHASES}
    self.collectives = collections.defaultdict(lambda: (0.0, 0.0))
    self.loops: dict[str, Loop] = {}
    self.unknown_trips: list[str] = []
    # Nested fusions are asked for their operands again and again. Kept in the instance, the answers go with it.
    self._read = functools.cache(self._find_read)
    self._fused = {
      item.called["calls"]
      for computation in module.computations.values()
      for item in computation.instructions.values()
      if item.opcode == "fusion"
    }
    # The text shows an asynchronous collective up to three times: at its start, in the fusion that runs at the same
    # time, and at its end. It must be counted only once, so the channels of those that have a start are noted here.
    self._started = {
      _channel(item)
      for computation in module.computations.values()
      if _starts(computation)
      for item in computation.instructions.values()
      if item.opcode in _COLLECTIVES
    }

  def visit(self, computation: Computation, times: float, phase: str, loop: Loop | None):
    """Adds the costs of a computation's instructions.

    Args:
      computation: the computation.
      times: how often it runs.
      phase: phase of the caller, used for instructions without a scope of their own.
      loop: the outermost loop around it; None outside loops.
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
    trips = self.turns(item.op_name)
    if trips is None:
      trips = hlo.trip_count(self.module, computation, item)
    if trips is None:
      self.unknown_trips.append(item.op_name or item.name)
    inner_times = times * (1 if trips is None else trips)
    if loop is None or DECODE.search(item.op_name):
      all_trips = None if trips is None else inner_times
      loop = self.loops[item.name] = Loop(phase, all_trips, Cost(), item.op_name)
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
    """Bytes of HBM that an instruction reads and writes.

    If it only reads a slice of an operand, or updates a slice in place, only the slice counts.
    """
    if is_kernel(item):
      arrays = [array for name in item.operands for array in computation.instructions[name].arrays]
      return float(sum(array.bytes for array in (*arrays, *item.arrays) if array.space == 0))
    if item.opcode in _FREE:
      return 0.0
    if item.opcode in ("copy-start", "slice-start"):
      # A prefetch. Its result is (destination, source, ...), or for a slice (source, destination, ...). The smaller of
      # the two is what is moved, and it counts for each side that is in HBM.
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

  def _find_read(self, inner: Computation, index: int) -> float | None:
    """The bytes of an operand that a fusion reads; None means all of it."""
    total, pending = 0.0, [inner.parameters[index].name]
    while pending:
      name = pending.pop()
      for user in inner.users[name]:
        position = user.operands.index(name)
        if user.opcode == "bitcast":
          pending.append(user.name)
          continue
        if user.opcode == "tuple" or self._is_repeat(inner, user):
          continue  # passed on without being read
        if user.opcode == "fusion":
          nested = self.module.computations[user.called["calls"]]
          if _unwrapped(nested, nested.root.name) is nested.parameters[position]:
            pending.append(user.name)  # the nested fusion only returns a view of the operand
            continue
          part = self._read(nested, position)
        else:
          part = _sliced(user, position)
        if part is None:
          return None
        total += part
    return total

  def _written(self, inner: Computation) -> list[float | None]:
    """The bytes of each result that a fusion writes; None means all of it."""
    if _starts(inner):
      return [0.0, None]  # (the operand, passed on; the buffer of the result)
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
    """Whether this instruction shows an asynchronous collective again that was counted at its start."""
    if computation.name not in self._fused or _starts(computation) or _scatters(computation):
      return False
    return item.opcode in _COLLECTIVES and _channel(item) in self._started

  def _wire_bytes(self, computation, item: Instruction, times: float, use: str = "") -> float:
    """The bytes that an instruction's collectives send within the slice. Also records them by kind and name.

    Args:
      computation, item: the instruction.
      times: how often it runs.
      use: op_name of the fusion around it, for collectives that have no name of their own.
    """
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
    """The bytes sent to other slices. Such a collective is a send to the host, whose runtime does the rest."""
    if item.opcode != "send" or not (match := _MEGASCALE.search(item.text)):
      return 0.0
    kind = match["kind"].lower().replace("_", "-")
    sent = _ring_bytes(kind, item, computation, self.num_slices)
    return self._file(f"DCN {kind}", match["name"], times, sent)

  def _file(self, kind: str, name: str, times: float, sent: float) -> float:
    """Records a collective that runs `times` and sends `sent` bytes each time. Returns the total bytes."""
    count, total = self.collectives[kind, name]
    self.collectives[kind, name] = count + times, total + times * sent
    return times * sent


def _unwrapped(computation: Computation, name: str) -> Instruction:
  """The instruction behind a chain of bitcasts, which are only views of its result."""
  item = computation.instructions[name]
  while item.opcode == "bitcast":
    item = computation.instructions[item.operands[0]]
  return item


def _channel(item: Instruction) -> tuple:
  return item.opcode, item.integer("channel_id")


def _scatters(computation: Computation) -> bool:
  """Whether this is a reduce-scatter. The TPU's compiler writes it as an all-reduce of which only a slice is kept."""
  return "all-reduce-scatter" in computation.name


def _starts(computation: Computation) -> bool:
  return "AsyncCollectiveStart" in computation.root.text


def _phase(computation: Computation, name: str) -> str | None:
  """The phase of an instruction, by its own name or else by the nearest user that has one; None if neither does."""
  seen, pending = {name}, [name]
  while pending:
    item = computation.instructions[pending.pop(0)]
    if item.op_name.startswith("jit("):
      return next((phase for scope, phase in _PHASES if scope.search(item.op_name)), "update")
    # Breadth first, so that the nearest user decides. A loop may use values of all phases and decides nothing.
    for user in computation.users[item.name]:
      if user.name not in seen and user.opcode != "while":
        seen.add(user.name)
        pending.append(user.name)
  return None


def _cycles(item: Instruction) -> float:
  match = re.search(r'"estimated_cycles":"(\d+)"', item.text)
  return float(match[1]) if match else 0.0


def _sliced(item: Instruction, index: int) -> float | None:
  """The bytes of an operand that an instruction reads; None means all of it."""
  if item.opcode in _SLICES and index == 0:
    return float(item.arrays[0].bytes)
  if item.opcode in ("dynamic-update-slice", "scatter") and index == 0:
    return 0.0  # updated in place, without being read
  return None


def _updated(computation: Computation, item: Instruction) -> float | None:
  """The bytes of its result that an instruction writes; None means all of it."""
  if item.opcode == "dynamic-update-slice":
    return float(computation.instructions[item.operands[1]].arrays[0].bytes)
  return None


def _ring_bytes(kind: str, item: Instruction, computation: Computation, group: int) -> float:
  """The bytes that one device sends in a collective of `group` devices, with the usual ring algorithms."""
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
  """The number of devices that take part in a collective together.

  The text writes replica groups in three ways. Without any, all devices are one group.
  """
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):  # [groups, devices in a group]
    return int(match[2])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(match[1].split(","))
  return num_devices
