"""Reads the documentation of settings from the comments in the source.

Two kinds of comment are read. The comment of a field, in core/, says what the setting does and ends in its unit:
`# longest context [tokens]`. The comment beside a value, in configs/base.py, says where the value comes from: `# C.4`.

Called by commands/settings.py. No field is named here.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator

# Comments that formatters and linters read.
_FOR_TOOLS = re.compile(r"#\s*(fmt|noqa|type):.*|#\s*noqa\b.*")
_UNIT = re.compile(r"(?P<meaning>.*?)\s*\[(?P<unit>[^\[\]]+)\]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Fact:
  """The documentation of one field.

  Attributes:
    meaning: what the setting does; "" if the field has no comment.
    unit: the unit of its values; "" if the comment names none.
  """

  meaning: str
  unit: str


def facts(cls, where: str = "") -> Iterator[tuple[str, Fact]]:
  """Yields (dotted name, Fact) for a dataclass's own fields, then for the fields of each dataclass inside it."""
  written, hints = field_facts(cls), typing.get_type_hints(cls)
  inside = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
  for name in hints:
    if name not in inside:
      yield where + name, written[name]
  for name, hint in inside.items():
    yield from facts(hint, f"{where}{name}.")


def blocks(cls, where: str = "") -> Iterator[tuple[str, str]]:
  """Yields (dotted name, description) for every dataclass nested inside one.

  The description is the comment of the field, or else the first line of the nested dataclass's docstring.
  """
  written = field_facts(cls)
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield (
        where + name,
        written[name].meaning or (hint.__doc__ or "").partition("\n")[0].rstrip("."),
      )
      yield from blocks(hint, f"{where}{name}.")


def field_facts(cls) -> dict[str, Fact]:
  """Name -> Fact for the fields of a dataclass, inherited ones included, from the comments in its source.

  A comment stands on the same line as the field or, if it is long, on separate lines above it.
  """
  parents = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
  return {name: fact for base in parents for name, fact in _written(base).items()}


def _written(cls) -> dict[str, Fact]:
  """`field_facts` for one class, without its base classes."""
  # Dedented, because a class inside a function would not parse.
  source = textwrap.dedent(inspect.getsource(cls))
  (tree,) = ast.parse(source).body
  if not isinstance(tree, ast.ClassDef):
    raise ValueError(f"the source of {cls} is not that of a class")
  comments = _comments(source)
  result, last = {}, 0
  for node in tree.body:
    end = node.end_lineno or node.lineno
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      # Only comments that stand alone: one that ends the line above belongs to the field of that line.
      above = [line for line in range(last + 1, node.lineno) if _is_alone(comments, line)]
      lines = [*above, *range(node.lineno, end + 1)]
      text = " ".join(comments[line].text for line in lines if line in comments)
      match = _UNIT.fullmatch(text)
      result[node.target.id] = Fact(match["meaning"], match["unit"]) if match else Fact(text, "")
    last = end
  return result


def sources(source: str, function: str) -> dict[str, str]:
  """Maps each setting's dotted name to the source of its value, as the comments in a file of values state it.

  Args:
    source: text of a Python file whose functions return nested calls of `dict` or ConfigDict. A call to another
      function in the file stands for the values that this function returns, updated by the keywords of the call.
    function: name of the function that returns all values.
  Returns:
    Dotted name -> comment, "" for a value without one. A comment applies to all values on its line.
  """
  tree, comments = ast.parse(source), _comments(source)
  functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

  def beside(node) -> str:
    line = comments.get(node.end_lineno)
    return line.text if line else ""

  def walk(node, where: str) -> dict[str, str]:
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if called == "ConfigDict":
      return walk(node.args[0], where)
    if called == "dict":
      return inside(node, where, [])
    if called in functions:
      made = functions[called]
      # What the call passes comes last: it overrides the value, so the comment of the default no longer applies.
      return returned(made, where) | inside(node, where, [arg.arg for arg in made.args.args])
    return {where: beside(node)}

  def inside(call: ast.Call, where: str, parameters: list[str]) -> dict[str, str]:
    given = [
      *zip(parameters, call.args),
      *((one.arg, one.value) for one in call.keywords if one.arg),
    ]
    found = {}
    for name, value in given:
      found |= walk(value, f"{where}.{name}" if where else name)
    return found

  def returned(made: ast.FunctionDef, where: str) -> dict[str, str]:
    # ast.walk visits outer nodes first, so the first ConfigDict holds all values of the function.
    calls = (node for node in ast.walk(made) if isinstance(node, ast.Call))
    first = next(node for node in calls if getattr(node.func, "id", "") == "ConfigDict")
    return walk(first, where)

  return returned(functions[function], "")


@dataclasses.dataclass(frozen=True)
class _Comment:
  text: str
  is_alone: bool  # whether the line holds nothing else


def _comments(source: str) -> dict[int, _Comment]:
  """Line number -> comment, leaving out comments for formatters and linters."""
  result = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    text = _FOR_TOOLS.sub("", token.string).lstrip("# ").rstrip()
    if token.type == tokenize.COMMENT and text:
      result[token.start[0]] = _Comment(text, not token.line[: token.start[1]].strip())
  return result


def _is_alone(comments: dict[int, _Comment], line: int) -> bool:
  return line in comments and comments[line].is_alone
