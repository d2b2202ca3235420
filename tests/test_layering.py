"""Imports point only downward, and configs are complete: no default is hidden in the code.

Reads the source with `ast`; imports nothing of the project.
"""

import ast
import graphlib
import itertools
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Lowest first. A part (a folder with all its modules, or a module at the top) imports parts of lower
# rows only, never its neighbours. A new module takes the lowest folder above everything that it imports.
LAYERS = (
  ("core",),
  ("ops", "parallel", "data"),
  ("models", "report"),
  ("train", "labels"),
  ("rl",),
  ("serve", "stages", "evaluation"),
  ("commands",),
  ("main", "evaluate", "compare", "label", "__main__"),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}

# Data with labelers and a gold score of its own, which only the registry of sources looks up.
SIMULATED = ("instructjax.data.demo", "instructjax.data.conversation")

# Narrower than the rows: what a part may not import although it is lower, or not the project's.
FORBIDDEN = {
  "core.structs": {"flax", "optax"},
  "core.blocks": {"jax", "ml_collections"},
  "core.config": {"jax", "ml_collections"},
  "core.errors": {"jax"},
  "core.provenance": {"jax"},
  "core.results": {"jax", "numpy"},
  "core.stages": {"jax", "numpy"},
  "stages.lineage": {"jax"},  # launch/ plans before JAX is set up
  "parallel.memory": {"jax"},  # must run before jax is imported
  "parallel.chips": {"jax"},
  "labels": {"jax", "instructjax.core.config"},
  "ops": {"flax", "instructjax.core.config"},
  "data": {"flax", "instructjax.core.config"},
  "data.conversation": {"jax"},
  "data.demo": {"jax"},
  "report": {"jax"},
  "rl": {"instructjax.data"},  # inside the compiled step there is no host
}


def sources(folder: str) -> dict[str, ast.Module]:
  """Dotted module name -> parsed file."""
  result = {}
  for path in sorted((ROOT / folder).rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    result[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
  return result


PACKAGE = sources("instructjax")
CONFIGS = sources("configs")


def imports(tree: ast.AST) -> set[str]:
  """Dotted names of what a file imports anywhere; a.b of `from a import b` if b is a module."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"line {node.lineno}: imports are absolute"
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      modules = PACKAGE.keys() | CONFIGS.keys() | {"flax.linen"}
      found |= names & modules
      if names - modules:
        found.add(node.module)
  return found


def part(module: str) -> str | None:
  """`instructjax.ops.gae` -> `ops`; None for what is not a part of the package."""
  names = module.split(".")
  return names[1] if names[0] == "instructjax" and len(names) > 1 else None


def within(module: str, parent: str) -> bool:
  return module == parent or module.startswith(parent + ".")


def is_demo_lookup(module: str, imported: str) -> bool:
  """The one arrow that points up: the registry of sources finds the simulated tasks."""
  return module == "instructjax.data.sources" and imported in SIMULATED


def test_every_part_has_a_layer():
  parts = {part(module) for module in PACKAGE} - {None}
  assert parts == LAYER_OF.keys(), "put new parts into LAYERS, take old ones out"


@pytest.mark.parametrize("module", PACKAGE)
def test_imports_point_downward(module):
  for imported in imports(PACKAGE[module]):
    assert not within(imported, "configs"), (
      f"{module} imports {imported}: values come in as arguments"
    )
    here, there = part(module), part(imported)
    if here in (None, there) or there is None or is_demo_lookup(module, imported):
      continue
    assert LAYER_OF[there] < LAYER_OF[here], f"{module} imports {imported}, which is not below it"


def test_no_import_cycle_inside_a_package():
  graph = {
    module: {
      name
      for name in imports(tree)
      if name in PACKAGE and not is_demo_lookup(module, name) and name != module
    }
    for module, tree in PACKAGE.items()
  }
  for package in [
    name for name in graph if any(within(other, name) and other != name for other in graph)
  ]:
    for other in graph:
      if within(other, package) and other != package:
        graph[other].discard(
          package
        )  # a module may import its siblings through the package that holds them
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("name", FORBIDDEN)
def test_parts_keep_away_from(name):
  modules = [module for module in PACKAGE if within(module, f"instructjax.{name}")]
  assert modules, f"instructjax.{name} is gone; take it out of FORBIDDEN"
  for module in modules:
    for imported, forbidden in itertools.product(imports(PACKAGE[module]), FORBIDDEN[name]):
      assert not within(imported, forbidden), f"{module} imports {imported}"


def test_only_models_import_flax_linen():
  users = {
    part(m) for m, tree in PACKAGE.items() if any(within(i, "flax.linen") for i in imports(tree))
  }
  assert users == {"models"}


@pytest.mark.parametrize("task", SIMULATED)
def test_only_the_source_registry_imports_a_simulated_task(task):
  users = {
    module
    for module, tree in PACKAGE.items()
    if not within(module, task) and any(within(name, task) for name in imports(tree))
  }
  assert users == {"instructjax.data.sources"}
  at_top = [
    node
    for node in PACKAGE["instructjax.data.sources"].body
    if isinstance(node, ast.ImportFrom | ast.Import)
  ]
  assert not any(within(name, task) for node in at_top for name in imports(node)), (
    "import it lazily"
  )


def test_configs_import_configs_only():
  for module, tree in CONFIGS.items():
    for imported in imports(tree):
      top = imported.partition(".")[0]
      allowed = {"configs", "ml_collections"} | sys.stdlib_module_names
      assert top in allowed, f"{module} imports {imported}"


def hidden_defaults(tree: ast.AST) -> list[int]:
  """Lines of `config.get(...)` and `getattr(config, name, default)`, where the name says config."""

  def is_config(node) -> bool:
    name = (
      node.attr
      if isinstance(node, ast.Attribute)
      else node.id
      if isinstance(node, ast.Name)
      else ""
    )
    return re.fullmatch(r"(\w+_)?(config|cfg)", name) is not None

  def is_hidden_default(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
      return call.func.attr == "get" and is_config(call.func.value)
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name == "getattr" and len(call.args) + len(call.keywords) > 2 and is_config(call.args[0])

  return [
    node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and is_hidden_default(node)
  ]


@pytest.mark.parametrize("module", PACKAGE | CONFIGS)
def test_no_hidden_defaults(module):
  lines = hidden_defaults((PACKAGE | CONFIGS)[module])
  assert not lines, (
    f"{module} lines {lines}: every field is in configs/base.py, read it as an attribute"
  )


@pytest.mark.parametrize(
  "code, hidden",
  [
    ("config.get('beta', 0.02)", True),
    ("run.ppo_cfg.get('beta')", True),
    ("getattr(cfg, 'beta', 0.02)", True),
    ("getattr(ctx.config, stage)", False),
    ("metrics.get('kl')", False),
    ("getattr(error, 'strerror', None)", False),
  ],
)
def test_what_counts_as_a_hidden_default(code, hidden):
  assert bool(hidden_defaults(ast.parse(code))) == hidden
