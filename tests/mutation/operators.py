"""Makes mutants of a module: copies of its source with one small change each, as a slip of the hand would make it.

Called by `plan`. Works on source text only; imports nothing of the project.

Not changed are annotations, docstrings, messages, decorators, imports, asserts and calls that only check or log, and
what gives an array's shape or type alone, where another array of the same kind would do as well.
"""

import ast
import copy
import dataclasses
import hashlib
import re
from collections.abc import Iterator

COMPARISONS = {
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
}
# A comparison the other way round, beside the one that is off by one.
REVERSED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
ARITHMETIC = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
}
CALLS = {
  "min": "max",
  "max": "min",
  "minimum": "maximum",
  "maximum": "minimum",
  "nanmin": "nanmax",
  "mean": "sum",
  "sum": "mean",
  "masked_mean": "masked_sum",
  "masked_sum": "masked_mean",
  "any": "all",
  "all": "any",
  "argmax": "argmin",
  "sqrt": "square",
  "rsqrt": "sqrt",
  "floor": "ceil",
}
# Calls that guard or convert one of their arguments, which stands in for them: name -> its position.
WRAPPERS = {
  "stop_gradient": 0,
  "where": 1,
  "clip": 0,
  "maximum": 0,
  "minimum": 0,
  "astype": -1,  # of the object
  "abs": 0,
  "sorted": 0,
  "_clip": 0,
  "shard_rows": 0,
}
DTYPES = {"float32": "bfloat16", "float64": "float32", "int64": "int32"}
_CHECKS = ("chex.", "logging.", "logger.", "warnings.", "require", "_warn", "print")
_LIKE = ("zeros_like", "ones_like", "full_like")
_KIND = re.compile(r"_([A-Z][A-Z0-9]*)$")


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One change of one module.

  Attributes:
    module: path below the package without suffix, as `rl/step`.
    where: name of the function or class around the change.
    what: the operator's name, or for a mutant written by hand what it does.
    old, new: text that is replaced, and by what.
    start: where the text begins in the source.
    number: counts equal changes within `where`.
  """

  module: str
  where: str
  what: str
  old: str
  new: str
  start: int
  number: int

  @property
  def id(self) -> str:
    """The same for the same change, wherever its function moves to within the module."""
    said = "\0".join((self.what, self.old, self.new, str(self.number)))
    return f"{self.module}:{self.where}:{hashlib.sha256(said.encode()).hexdigest()[:6]}"

  def apply(self, source: str) -> str:
    """The mutated source.

    Raises:
      ValueError: the text is not where it was.
    """
    end = self.start + len(self.old)
    if source[self.start : end] != self.old:
      raise ValueError(f"{self.id}: the source has changed")
    return source[: self.start] + self.new + source[end:]


def generate(module: str, source: str) -> list[Mutant]:
  """All mutants of a module, in the order of its source."""
  tree = ast.parse(source)
  offsets = _line_offsets(source)
  place = lambda line, column: (
    offsets[line - 1]
    + len(source[offsets[line - 1] :].split("\n", 1)[0].encode()[:column].decode())
  )
  counts: dict[tuple, int] = {}
  found = []
  for where, node, what, new in _changes(tree):
    start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
    old = source[start:end]
    text = new if isinstance(new, str) else ast.unparse(new)
    if isinstance(node, ast.expr) and not isinstance(node, ast.Constant | ast.Name | ast.Attribute):
      text = f"({text})"
    key = (where, what, old, text)
    counts[key] = counts.get(key, -1) + 1
    found.append(Mutant(module, where, what, old, text, start, counts[key]))
  return found


def _line_offsets(source: str) -> list[int]:
  offsets = [0]
  for line in source.split("\n"):
    offsets.append(offsets[-1] + len(line) + 1)
  return offsets


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str, ast.AST | str]]:
  """(name of the place, node, operator, what to put in place of the node)."""
  for name, function in _functions(tree):
    bound = _bound(function)
    for node in _nodes(function):
      for what, new in _of_node(node, bound):
        yield name, node, what, new


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
  """Functions and methods by name; a function within another belongs to the outer one."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef):
      yield node.name, node
    elif isinstance(node, ast.ClassDef):
      for inner in node.body:
        if isinstance(inner, ast.FunctionDef):
          yield f"{node.name}.{inner.name}", inner


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
  """The nodes below one that may be changed, outermost first."""
  for field, value in ast.iter_fields(node):
    if field in ("annotation", "returns", "decorator_list", "type_params"):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.AST) and not _is_spared(child):
        yield child
        yield from _nodes(child)


def _is_spared(node: ast.AST) -> bool:
  """Docstrings, messages, and statements that only check or tell."""
  if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
    return True
  if isinstance(node, ast.Attribute) and node.attr in ("shape", "size", "ndim", "dtype"):
    return True
  if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _LIKE:
    return True
  if isinstance(node, ast.Expr):
    if isinstance(node.value, ast.Constant):
      return True
    call = node.value
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith(_CHECKS)
  return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _bound(function: ast.AST) -> dict[str, int]:
  """The line at which each variable of a function first has a value."""
  lines: dict[str, int] = {}
  for node in ast.walk(function):
    if isinstance(node, ast.arg):
      lines[node.arg] = 0
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
      lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
  return lines


def _of_node(node: ast.AST, bound: dict[str, int]) -> Iterator[tuple[str, ast.AST | str]]:
  """(operator, new node or text) of all changes of one node."""
  match node:
    case ast.Compare(ops=[op]):
      for what, table in (("flip comparison", COMPARISONS), ("reverse comparison", REVERSED)):
        if type(op) in table:
          yield what, _with(node, ops=[table[type(op)]()])
    case ast.BinOp() if type(node.op) in ARITHMETIC:
      yield "swap operator", _with(node, op=ARITHMETIC[type(node.op)]())
    case ast.AugAssign() if type(node.op) in ARITHMETIC:
      yield "swap operator", _with(node, op=ARITHMETIC[type(node.op)]())
    case ast.BoolOp():
      other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
      yield "swap and/or", _with(node, op=other)
    case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub()):
      yield "drop sign or not", node.operand
    case ast.Constant(value=bool()):
      yield "replace constant", repr(not node.value)
    case ast.Constant(value=int()):
      yield "off by one", repr(node.value + 1)
      if node.value > 1:
        yield "off by one", repr(node.value - 1)
    case ast.Constant(value=float()):
      yield "replace constant", repr(node.value * 2 if node.value else 1.0)
    case ast.Call():
      yield from _of_call(node)
    case ast.Attribute(attr=name, ctx=ast.Load()) if name in DTYPES:
      yield "change dtype", _with(node, attr=DTYPES[name])
    case ast.Attribute(attr=name, ctx=ast.Load()) if name in CALLS and isinstance(
      node.value, ast.Name
    ):
      yield "swap function", _with(node, attr=CALLS[name])
    case ast.Name(id=name, ctx=ast.Load()) if name in CALLS:
      yield "swap function", _with(node, id=CALLS[name])
    case ast.Name(id=name, ctx=ast.Load()) if _KIND.search(name):
      alike = sorted(
        x for x, line in bound.items() if line < node.lineno and _kind(x) == _kind(name)
      )
      if others := [x for x in alike if x > name] + [x for x in alike if x < name]:
        yield "swap variable", _with(node, id=others[0])
    case ast.IfExp(test=ast.Name() | ast.Attribute()):
      yield "negate condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test))


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST | str]]:
  function = node.func
  name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
  if name in WRAPPERS:
    position = WRAPPERS[name]
    if position < 0:
      if isinstance(function, ast.Attribute):
        yield "remove wrapper", function.value
    elif len(node.args) > position:
      yield "remove wrapper", node.args[position]
  for index, keyword in enumerate(node.keywords):
    if keyword.arg == "axis" and isinstance(keyword.value, ast.Constant | ast.UnaryOp):
      other = {0: 1, 1: 0}.get(getattr(keyword.value, "value", None), 0)
      changed = copy.deepcopy(node)
      changed.keywords[index].value = ast.Constant(other)
      yield "swap axis", changed
  if len(node.args) == 2 and all(isinstance(arg, ast.Name) for arg in node.args):
    yield "swap arguments", _with(node, args=node.args[::-1])


def _kind(name: str) -> tuple[str, bool] | None:
  """What makes two variables easy to confuse: the same dimensions, and both masks or both values."""
  found = _KIND.search(name)
  return (found.group(1), name.startswith("is_")) if found else None


def _with(node: ast.AST, **fields) -> ast.AST:
  changed = copy.copy(node)
  for name, value in fields.items():
    setattr(changed, name, value)
  return changed
