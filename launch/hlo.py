"""Parses the text of a compiled TPU program, and finds out how often each loop runs. Called by costs.py.

The compiler's own totals count the body of a loop once, whatever its length, and its text does not state the number of
trips. It is therefore worked out from the loop's condition (`counter < N`), the counter's first value, and the step
that the body adds. The step may be 2, if XLA has unrolled the loop. Imports nothing of the project and no JAX.
"""

import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Types whose name does not give the size in bits, or not correctly: a `pred` takes a byte.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result."""

  dtype: str
  dims: tuple[int, ...]
  space: int  # memory space: 0 is HBM, 5 is the host's memory, and others are on the chip

  @property
  def bytes(self) -> int:
    digits = re.search(r"\d+", self.dtype)
    bits = _BITS.get(self.dtype) or int(digits.group() if digits else 0)
    return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One instruction of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result; several if it is a tuple
  operands: tuple[str, ...]
  inner: str  # the text between the parentheses
  text: str  # the text after the operands, which holds the attributes
  is_root: bool

  @functools.cached_property
  def op_name(self) -> str:
    """JAX's name of the operation, preceded by its scopes; '' if the compiler gives none."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
    return match[1] if match else ""

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Attribute -> name of the computation that it calls."""
    return {m[0].split("=")[0]: m[1] for m in _CALLED.finditer(self.text)}

  @functools.cached_property
  def branches(self) -> list[str]:
    """The names of a conditional's branches."""
    match = _BRANCHES.search(self.text)
    both = ("true_computation", "false_computation")
    return _NAMES.findall(match[1]) if match else [self.called[b] for b in both if b in self.called]

  def integer(self, attribute: str) -> int | None:
    """The value of an integer attribute; None if the instruction has no such attribute."""
    match = re.search(rf"\b{attribute}=(\d+)", self.text)
    return int(match[1]) if match else None


class Computation:
  """A computation: its instructions by name, in the order in which they run."""

  def __init__(self, name: str, instructions: list[Instruction]):
    self.name = name
    self.instructions = {item.name: item for item in instructions}
    self.root = next((item for item in instructions if item.is_root), instructions[-1])
    self.parameters = {int(item.inner): item for item in instructions if item.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name of an instruction -> the instructions that use its result."""
    result = {name: [] for name in self.instructions}
    for item in self.instructions.values():
      for operand in dict.fromkeys(item.operands):
        if operand in result:
          result[operand].append(item)
    return result


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program."""

  computations: dict[str, Computation]
  entry: Computation


def parse(text: str) -> Module:
  """Parses a compiled program, from `compiled.as_text()`.

  Raises:
    ValueError: the text has no ENTRY computation.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    header = _HEADER.match(line) if name is None else None
    if header:
      name, lines = header[2], []
      entry = name if header[1] else entry
    # The whole line must be `}`: the attributes of a kernel have lines that begin with one.
    elif name is not None and line == "}":
      computations[name] = Computation(name, [_instruction(item) for item in lines])
      name = None
    elif name is not None and _INSTRUCTION.match(line):
      lines.append(line)
    elif name is not None and lines:  # the continuation of an instruction
      lines[-1] += " " + line
  if entry not in computations:
    raise ValueError("not the text of a compiled program: it has no ENTRY computation")
  return Module(computations, computations[entry])


def _closing(text: str, start: int) -> int:
  """The index of the parenthesis that closes the one at `start`.

  Raises:
    ValueError: it is not closed.
  """
  depth = 0
  for index in range(start, len(text)):
    depth += (text[index] == "(") - (text[index] == ")")
    if depth == 0:
      return index
  raise ValueError(f"unbalanced parentheses in compiled text: {text[:80]}")


def _instruction(line: str) -> Instruction:
  root, name, rest = _INSTRUCTION.match(line).groups()
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  inner = rest[opening + 1 : closing]
  arrays = tuple(
    Array(m[1], tuple(map(int, m[2].split(","))) if m[2] else (), _space(m[3] or ""))
    for m in _ARRAY.finditer(shape)
  )
  return Instruction(
    name=name,
    opcode=rest[:opening],
    arrays=arrays,
    operands=tuple(_NAMES.findall(inner)),
    inner=inner,
    text=rest[closing + 1 :],
    is_root=bool(root),
  )


def _space(layout: str) -> int:
  match = _SPACE.search(layout)
  return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class _Carried:
  """The value of a loop-carried variable plus a constant."""

  index: int
  plus: int


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
  """The largest number of times that the body of a while loop runs.

  A condition that also depends on something else, such as whether every row has ended, may end the loop earlier.

  Returns:
    The number, or None if the condition does not count up to a constant.
  """
  body = module.computations[loop.called["body"]]
  condition = module.computations[loop.called["condition"]]
  initial = caller.instructions[loop.operands[0]]

  def start(index: int):
    if initial.opcode != "tuple":
      return None
    return _value(module, caller, initial.operands[index], {})

  for computation, item, values in _compares(module, condition):
    left, right = (_value(module, computation, name, values) for name in item.operands)
    direction = re.search(r"direction=(\w+)", item.text)[1]
    # The limit may be carried through the loop as well. Its initial value is then the limit.
    if isinstance(left, _Carried) and isinstance(right, _Carried):
      right = start(right.index)
    if (
      not isinstance(left, _Carried) or not isinstance(right, int) or direction not in ("LT", "LE")
    ):
      continue
    # What the body makes of the counter must be the counter plus a positive constant.
    step = _value(module, body, body.root.operands[left.index], {0: None})
    if not isinstance(step, _Carried) or step.index != left.index or step.plus <= 0:
      continue
    first = start(left.index)
    first = first if isinstance(first, int) else 0
    distance = right + (direction == "LE") - left.plus - first
    return max(0, math.ceil(distance / step.plus))
  return None


def _compares(module: Module, condition: Computation):
  """Yields (computation, compare instruction, values of the computation's parameters) for a loop's condition.

  Comparisons inside the condition's fusions are included.
  """
  for item in condition.instructions.values():
    if item.opcode == "compare":
      yield condition, item, {0: None}
    elif item.opcode == "fusion":
      values = {
        index: _value(module, condition, name, {0: None})
        for index, name in enumerate(item.operands)
      }
      inner = module.computations[item.called["calls"]]
      for other in inner.instructions.values():
        if other.opcode == "compare":
          yield inner, other, values


def _value(module: Module, computation: Computation, name: str, values: dict, element: int = 0):
  """Evaluates an instruction symbolically, as far as this is needed to follow a loop's counter.

  Args:
    module, computation, name: the instruction.
    values: number of a parameter -> its value; None for the tuple that a loop carries.
    element: index of the result, if the instruction has several.
  Returns:
    An integer, a _Carried, or None if the value is neither.
  """
  item = computation.instructions[name]
  operand = functools.partial(_value, module, computation, values=values)
  match item.opcode:
    case "constant":
      return int(item.inner) if re.fullmatch(r"-?\d+", item.inner) else None
    case "parameter":
      return values.get(int(item.inner))
    case "get-tuple-element":
      source, index = computation.instructions[item.operands[0]], item.integer("index")
      if source.opcode == "parameter":
        return _Carried(index, 0)
      return _value(module, computation, source.name, values, index)
    case "copy" | "bitcast" | "convert" | "copy-done" | "copy-start" | "reshape":
      return operand(item.operands[0])
    case "tuple":
      return operand(item.operands[element])
    case "add":
      left, right = (operand(one) for one in item.operands)
      if isinstance(left, int):
        left, right = right, left
      if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.plus + right)
      return left + right if isinstance(left, int) and isinstance(right, int) else None
    case "fusion":
      inner = module.computations[item.called["calls"]]
      arguments = {index: operand(one) for index, one in enumerate(item.operands)}
      return _value(module, inner, inner.root.name, arguments, element)
  return None
