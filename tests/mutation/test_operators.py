"""The mutants that operators make, on sources of a few lines; no campaign is run here."""

import ast

import pytest

from tests.mutation import __main__ as command
from tests.mutation import operators, plan, written


def mutated(body: str, arguments: str = "x") -> dict[str, list[str]]:
  """Operator -> the bodies that it makes of a function's."""
  source = f"def f({arguments}):\n  {body}\n"
  found: dict[str, list[str]] = {}
  for mutant in operators.generate("a/b", source):
    changed = mutant.apply(source)
    assert changed != source and ast.parse(changed)
    found.setdefault(mutant.what, []).append(changed.split("\n", 1)[1].strip())
  return found


@pytest.mark.parametrize(
  ("body", "what", "expected"),
  [
    ("return x < y", "flip comparison", ["return (x <= y)"]),
    ("return x < y", "reverse comparison", ["return (x > y)"]),
    ("return x is None", "flip comparison", ["return (x is not None)"]),
    ("return x - y", "swap operator", ["return (x + y)"]),
    ("return x & y", "swap operator", ["return (x | y)"]),
    ("x += y", "swap operator", ["x -= y"]),
    ("return x and y", "swap and/or", ["return (x or y)"]),
    ("return not x", "drop sign or not", ["return (x)"]),
    ("return x[:, 1:]", "off by one", ["return x[:, 2:]"]),
    ("return 2", "off by one", ["return 3", "return 1"]),
    ("return 0.5", "replace constant", ["return 1.0"]),
    ("return True", "replace constant", ["return False"]),
    ("return jnp.mean(x)", "swap function", ["return jnp.sum(x)"]),
    ("return min(x, 1)", "swap function", ["return max(x, 1)"]),
    ("return jnp.where(m, x, 0)", "remove wrapper", ["return (x)"]),
    ("return stop_gradient(x)", "remove wrapper", ["return (x)"]),
    ("return x.astype(jnp.float32)", "remove wrapper", ["return (x)"]),
    ("return x.astype(jnp.float32)", "change dtype", ["return x.astype(jnp.bfloat16)"]),
    ("return g(x, axis=-1)", "swap axis", ["return (g(x, axis=0))"]),
    ("return g(x, y)", "swap arguments", ["return (g(y, x))"]),
    ("return x if y else 1.5", "negate condition", ["return (x if not y else 1.5)"]),
  ],
)
def test_what_each_operator_makes(body, what, expected):
  assert mutated(body)[what] == expected


def test_variables_are_swapped_with_the_next_of_their_kind():
  """Masks with masks and values with values of the same dimensions, if they have a value by then."""
  arguments = "is_actor_BR, is_response_BR, return_BR, value_BR, score_B"
  found = mutated("return is_actor_BR, value_BR, score_B", arguments)["swap variable"]
  assert found == [
    "return is_response_BR, value_BR, score_B",
    "return is_actor_BR, return_BR, score_B",
  ]
  assert "swap variable" not in mutated("y = value_BR\n  later_BR = y", "value_BR")


@pytest.mark.parametrize(
  "body",
  [
    '"""At most 1 < 2."""',
    'raise ValueError(f"{x} < 1")',
    "chex.assert_rank(x, 2)",
    "require(x > 0)",
    "assert x > 0",
    'return "a"',
    "return x_BR.shape",
    "return jnp.zeros_like(x[:, 0])",
  ],
)
def test_what_is_left_alone(body):
  assert mutated(body, "x: 1, x_BR, y_BR") == {}


def test_an_id_stays_while_the_function_moves_and_tells_equal_changes_apart():
  source = "def f(x):\n  return x + 1, x + 1\n"
  ids = [mutant.id for mutant in operators.generate("a/b", source)]
  assert len(set(ids)) == len(ids) == 4
  assert [mutant.id for mutant in operators.generate("a/b", f"# é\n\n{source}")] == ids
  (first, *_), moved = operators.generate("a/b", source), "\n" + source
  with pytest.raises(ValueError, match="a/b:f:.*the source has changed"):
    first.apply(moved)


def test_a_sample_keeps_what_a_change_leaves():
  sources = {
    module: "def f(x):\n  return x + 1, x - 2, x * 3, x / 4\n" for module in plan.modules()
  }
  chosen = lambda changes=(), **kwargs: [
    mutant.id
    for mutant in plan.choose(sources | dict(changes), **dict(seed=0, share=1.0) | kwargs)[0]
  ]
  assert chosen() == chosen() != chosen(seed=1)
  more = sources["ops/gae"] + "\n\ndef g(x):\n  return x + 1\n"
  left = [name for name in chosen({"ops/gae": more}) if ":g:" not in name]
  assert set(left) <= set(chosen()) and len(left) >= len(chosen()) - 3
  assert not chosen(share=0.0)  # none of those written by hand stands in these sources
  assert len(plan.choose(sources, 0, 0.0)[1]) == len(written.WRITTEN)


def test_a_reason_whose_mutant_is_gone_is_told():
  sources = dict.fromkeys(plan.modules(), "def f(x):\n  return x + 1\n")
  (first, *_) = operators.generate("ops/gae", sources["ops/gae"])
  assert plan.without_mutant([first.id, "ops/gae:g:000000"], sources) == ["ops/gae:g:000000"]


def test_every_module_has_its_area_and_tests_that_are_there():
  for module in plan.modules():
    assert plan.area_of(module) in plan.AREAS
    assert all((command.ROOT / test).is_file() for test in plan.tests_of(module)), module
  assert {row[0] for row in written.WRITTEN} <= set(plan.modules())
  assert {*plan.ALSO} <= set(plan.modules())


def test_the_table_and_the_verdict():
  result = dict(id="a", area="ops", what="w", diff="-x\n+y\n", status="killed")
  results = [result | dict(id=str(n)) for n in range(19)] + [result | dict(status="survived")]
  text = command.table(results)
  assert "ops            20      19         0         1              0" in text
  assert "a (w): NO REASON\n-x\n+y" in text
  assert command.passes(results[:19]) and not command.passes(results)


def test_nothing_is_tried_while_a_test_fails_without_a_mutant(tmp_path, monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(command, "failing", lambda tests, _: asked.extend(tests) or ["FAILED a"])
  monkeypatch.setattr(command, "_import_what_tests_import", lambda: None)
  monkeypatch.setattr(command.signal, "signal", lambda *_: None)
  results = tmp_path / "results"
  assert command.main([f"--results={results}", "--only=stages/rm"]) == 1
  assert asked == ["tests/stages/test_rm.py", "tests/stages/test_pipeline.py"]
  assert capsys.readouterr().out == "fails without a mutant:\nFAILED a\n"
  assert not results.exists()
