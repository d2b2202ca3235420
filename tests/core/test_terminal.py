"""Tables and lines: nothing is cut off, nothing is read as markup, and nothing reaches a terminal raw."""

import ast
import io
import pathlib

import pytest
import rich.console

import instructjax
from instructjax.core import terminal

NASTY = ["x[/b]c", "[red]a", r"\[x\]", "a\x1b[2Jb", "[link=http://x]y", ":smile:", "a\rb", "אב"]
SHOWN = ["x[/b]c", "[red]a", r"\[x\]", r"a\x1b[2Jb", "[link=http://x]y", ":smile:", r"a\rb", "אב"]
COLUMNS = ["policy", "ended", "gold", "kl", "length", "names topic", "pretrain loss", "reward"]


def screen(width: int) -> rich.console.Console:
  return rich.console.Console(file=io.StringIO(), width=width, force_terminal=False)


def cells(text: str) -> list[list[str]]:
  """The cells of all lines of tables."""
  lines = [line for line in text.splitlines() if line[:1] in "│┃"]
  return [
    [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines
  ]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_name_and_no_number_is_cut(width):
  names = ["base", "reward_base", "few_shot", "ppo_ptx", "a_policy_with_a_name_beyond_all_measure"]
  rows = [[name, *(f"-{i}{j}.234" for j in range(7))] for i, name in enumerate(names)]
  to = screen(width)
  terminal.show(terminal.Table(COLUMNS, rows, title="means"), to)
  shown = to.file.getvalue()
  assert "…" not in shown and max(map(len, shown.splitlines())) <= width
  found = cells(shown)
  for number in (cell for row in rows for cell in row[1:]):
    assert any(number in row for row in found), number
  letters = "".join(row[0] for row in found)
  for name in names:
    assert name in letters
  for word in " ".join(COLUMNS).split():
    assert any(word in cell.split() for row in found for cell in row), word


@pytest.mark.parametrize("width", [40, 60, 80])
def test_prose_is_wrapped(width):
  measured = "ppo_ptx_minus_base 0.123, reward_gap_in_rm_std -1.234"
  table = terminal.Table(
    ["finding", "measured", "holds"],
    [["overoptimization", measured, "yes"]],
    prose=["measured"],
    styles={"yes": "green"},
  )
  to = screen(width)
  terminal.show(table, to)
  found = cells(to.file.getvalue())
  assert max(map(len, to.file.getvalue().splitlines())) <= width
  text = "".join(row[1] for row in found if row[1] != "measured").replace(" ", "")
  assert text == measured.replace(" ", "")
  assert any("yes" in row for row in found)


def test_prose_beside_a_wide_number_is_wrapped_and_the_number_is_not_cut():
  row = ["a task of some words", "ppo_ptx - sft", "-0.127 [-0.195, -0.051]", "cannot be told"]
  to = screen(80)
  columns = ["Task", "Models", "Difference", "Verdict"]
  terminal.show(terminal.Table(columns, [row], prose=["Models", "Verdict"]), to)
  lines = to.file.getvalue().splitlines()
  assert {line[-1] for line in lines} == set("┓┩┃│┘")  # the right edge of every line is there
  columns = list(zip(*cells(to.file.getvalue())[1:], strict=True))
  assert [" ".join(part for part in column if part) for column in columns] == row


def test_a_wide_terminal_has_one_table():
  to = screen(120)
  terminal.show(terminal.Table(COLUMNS, [["sft", *["1.000"] * 7]]), to)
  assert cells(to.file.getvalue()) == [COLUMNS, ["sft", *["1.000"] * 7]]


def test_text_is_only_text():
  to = screen(200)
  for line in NASTY:
    terminal.say(f"report: {line} ", bold=line, to=to)
  rows = [[line, line] for line in NASTY]
  terminal.show(
    terminal.Table(["[b]a", "[/b]"], rows, title="[i]t", prose=["[/b]"], footer=NASTY[:2]), to
  )
  shown = to.file.getvalue().replace("\u2068", "").replace("\u2069", "")
  for line in SHOWN:
    assert f"report: {line} {line}\n" in shown
    assert [line, line] in cells(shown)
  assert ["[b]a", "[/b]"] in cells(shown) and NASTY[:2] in cells(shown) and "[i]t" in shown
  assert not set(shown) & set("\x1b\r")


def test_a_right_to_left_cell_does_not_reorder_its_row():
  to = screen(80)
  terminal.show(terminal.Table(["a", "b"], [["אב", "1"]]), to)
  assert "\u2068אב\u2069" in to.file.getvalue()


def test_a_rule_and_a_bar_take_no_markup(capsys):
  terminal.rule("x[/b]c\x1b")
  assert capsys.readouterr().out.startswith(r"x[/b]c\x1b ─")
  to = rich.console.Console(file=io.StringIO(), width=100, force_terminal=True)
  bar = terminal.Bar(to, "[/b]", 2, 0, "[red]\x07")
  bar.start()
  bar.update(2, "loss [/x] 1")
  bar.stop()
  shown = to.file.getvalue()
  assert "[/b]" in shown and "loss [/x] 1" in shown and "2/2" in shown and "\x07" not in shown


def test_only_this_module_imports_rich():
  """So that all text goes through it."""
  root = pathlib.Path(instructjax.__file__).parent
  found = set()
  for path in root.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
      if any(name.split(".")[0] == "rich" for name in names):
        found.add(path.relative_to(root).as_posix())
  assert found == {"core/terminal.py"}
