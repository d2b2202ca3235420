"""tests/ mirrors instructjax/: tests/X/test_y.py tests instructjax/X/y.py, and exceptions have a reason here.

Reads files and names only; imports nothing of the project.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = 25  # lines of code up to which a module needs no file of its own

_RULES = (
  "its rules are cases of `_RULES` in core/test_config.py, which fails for a rule without a case"
)
_RECORDS = (
  "records without code; train/test_finished.py writes and reads them, the report's tests show them"
)

# Modules without a test file of their name -> where they are tested instead.
TESTED_ELSEWHERE = {
  "core/network": _RULES,
  "core/training": _RULES,
  "core/rl_training": _RULES,
  "core/running": _RULES,
  "core/results": _RECORDS,
  "report/results": _RECORDS,
}
# Test files without a module of their name -> their subject.
NO_MODULE = {
  "test_docs": "README.md, CONTRIBUTING.md and docs/: what they name",
  "test_layering": "all modules: what each may import",
  "test_mirror": "the tests themselves",
  "test_package": "what pip installs",
  "test_types": "all modules, by a type checker",
  "fuzz/test_targets": "all readers: some of the damaged files that the fuzz command makes; the command itself",
  "data/test_docs_data": "docs/data.md: what it says of each source",
  "data/test_real_data": "all sources, on published data",
  "mutation/test_operators": "tests/mutation, the campaign that is no part of the suite",
  "rl/test_step_program": "rl/step as a compiled program: minutes of compilation that test_step does without",
  "train/test_other_mesh": "checkpoints and training together, from one mesh to another",
}
# Folders beside the package: a test file is named after any file there, program or not.
BESIDE = ("benchmarks", "configs", "launch")
ABOUT_A_FOLDER = {
  "benchmarks/test_benchmarks": "all programs: flags, and that they run",
  "configs/test_presets": "all presets",
}


def lines_of_code(path: pathlib.Path) -> int:
  """Lines that statements stand on, docstrings left out."""
  lines = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.stmt) and not is_text:
      is_block = isinstance(node, ast.FunctionDef | ast.ClassDef)
      lines |= {node.lineno} if is_block else {*range(node.lineno, node.end_lineno + 1)}
  return len(lines)


def names(folder: pathlib.Path, pattern: str) -> dict[str, pathlib.Path]:
  """Path below the folder, without the suffix -> file."""
  return {
    path.relative_to(folder).with_suffix("").as_posix(): path
    for path in sorted(folder.rglob(pattern))
  }


MODULES = names(ROOT / "instructjax", "*.py")
TESTS = names(ROOT / "tests", "test_*.py")


def file_of(module: str) -> str:
  folder, _, name = module.rpartition("/")
  return f"{folder}/test_{name}".removeprefix("/")


def subject(test: str) -> str:
  folder, _, name = test.rpartition("/")
  return f"{folder}/{name.removeprefix('test_')}".removeprefix("/")


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_every_module_has_its_tests(module):
  has_tests = file_of(module) in TESTS
  if module in TESTED_ELSEWHERE:
    assert not has_tests, f"take {module} out of TESTED_ELSEWHERE"
    return
  count = lines_of_code(MODULES[module])
  assert has_tests or count <= SMALL, (
    f"instructjax/{module}.py has {count} lines of code and no tests/{file_of(module)}.py"
  )


def names_something(test: str) -> bool:
  """Whether a test file has the name of a module, of its own folder's package, or of a file beside the package."""
  of = subject(test)
  folder, _, name = of.rpartition("/")
  if folder.partition("/")[0] in BESIDE:
    return any(path.stem == name for path in (ROOT / folder).iterdir() if path.is_file())
  is_own_folder = folder.rpartition("/")[2] == name and f"{folder}/__init__" in MODULES
  return of in MODULES or is_own_folder


@pytest.mark.parametrize("test", TESTS)
def test_every_test_file_names_what_it_tests(test):
  excepted = NO_MODULE | ABOUT_A_FOLDER
  if test in excepted:
    assert not names_something(test), f"take {test} out of the table"
    return
  assert names_something(test), f"tests/{test}.py tests no instructjax/{subject(test)}.py"


def test_exceptions_are_there():
  assert TESTED_ELSEWHERE.keys() <= MODULES.keys()
  assert NO_MODULE.keys() | ABOUT_A_FOLDER.keys() <= TESTS.keys()


def test_how_lines_are_counted(tmp_path):
  """The import, the def, the two lines of the call; not docstrings, comments, decorators or blank lines."""
  path = tmp_path / "a.py"
  path.write_text('"""A\n\nB"""\nimport b\n\n\ndef c():\n  "d"\n  # e\n  return b(\n    1)\n')
  assert lines_of_code(path) == 4
