"""Reading a compiled TPU program's text: its computations, how often each loop runs. Called by costs.py.

The compiler's own totals count a loop's body once, whatever its length, and its text names no trip count: it is read
from the loop's condition (`counter < N`), from where the counter starts and from what the body adds to it, which is 2
where XLA has unrolled by hand. Imports nothing of the project and no JAX.
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
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result; memory space 0 is HBM, 5 the host's memory, others are on the chip."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> int:
    digits = re.search(r"\d+", self.dtype)
    bits = _BITS.get(self.dtype) or int(digits.group() if digits else 0)
    return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """`arrays` are those of the result, a tuple's in order; `text` is what follows the operands."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  inner: str  # what stands between the parentheses
  text: str
  is_root: bool

  @functools.cached_property
  def op_name(self) -> str:
    """JAX's name of the operation, scopes first; '' where the compiler gives none."""
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
    return match[1] if match else ""

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Attribute -> computation."""
    return {m[0].split("=")[0]: m[1] for m in _CALLED.finditer(self.text)}

  @functools.cached_property
  def branches(self) -> list[str]:
    """Computations of a conditional."""
    match = _BRANCHES.search(self.text)
    both = ("true_computation", "false_computation")
    return _NAMES.findall(match[1]) if match else [self.called[b] for b in both if b in self.called]

  def integer(self, attribute: str) -> int | None:
    match = re.search(rf"\b{attribute}=(\d+)", self.text)
    return int(match[1]) if match else None


class Computation:
  """Instructions by name, in the order they run in."""

  def __init__(self, name: str, instructions: list[Instruction]):
    self.name = name
    self.instructions = {item.name: item for item in instructions}
    self.root = next((item for item in instructions if item.is_root), instructions[-1])
    self.parameters = {int(item.inner): item for item in instructions if item.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    result = {name: [] for name in self.instructions}
    for item in self.instructions.values():
      for operand in dict.fromkeys(item.operands):
        if operand in result:
          result[operand].append(item)
    return result


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: Computation


def parse(text: str) -> Module:
  """A compiled program, `compiled.as_text()`.

  A computation ends at a line that is `}`: a kernel's attributes have lines that begin with one.

  Raises:
    ValueError: there is no ENTRY computation in it.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    header = _HEADER.match(line) if name is None else None
    if header:
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif name is not None and line == "}":
      computations[name] = Computation(name, [_instruction(item) for item in lines])
      name = None
    elif name is not None and _INSTRUCTION.match(line):
      lines.append(line)
    elif name is not None and lines:
      lines[-1] += " " + line
  if entry not in computations:
    raise ValueError("not the text of a compiled program: it has no ENTRY computation")
  return Module(computations, computations[entry])


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
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
  """The loop-carried value `index`, plus a constant."""

  index: int
  plus: int


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
  """How often a while loop's body runs, at most; None where its condition does not count up to a constant.

  A condition that also asks for something else (whether every row has ended) may end it sooner.
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
    if isinstance(left, _Carried) and isinstance(right, _Carried):
      right = start(right.index)
    if (
      not isinstance(left, _Carried) or not isinstance(right, int) or direction not in ("LT", "LE")
    ):
      continue
    step = _value(module, body, body.root.operands[left.index], {0: None})
    if not isinstance(step, _Carried) or step.index != left.index or step.plus <= 0:
      continue
    first = start(left.index)
    first = first if isinstance(first, int) else 0
    distance = right + (direction == "LE") - left.plus - first
    return max(0, math.ceil(distance / step.plus))
  return None


def _compares(module: Module, condition: Computation):
  """(computation, compare, values of its parameters) in a condition, those inside its fusions included."""
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
  """An integer, a _Carried, or None for what is neither.

  Args:
    module, computation, name: the instruction.
    values: of the computation's parameters; None for the tuple that a loop carries.
    element: which one, of an instruction that yields several.
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
