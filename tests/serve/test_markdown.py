"""Names and commands inside Markdown, YAML, Python and shell: each is read back as it was."""

import json
import shlex

import pytest

from instructjax.serve import markdown

NASTY = [
  "a|b",
  "x`y``z",
  "`",
  "<script>alert(1)</script>",
  "**bold** _it_ [link](http://x)",
  "a: b # c",
  "\"quotes\" 'and' \\ more",
  "two\nlines\x1b[2J",
  "$x_$",
]


@pytest.mark.parametrize(
  ("raw", "shown"),
  [
    ("reward_model 0.5", "reward_model 0.5"),
    ("_it_ **b**", r"\_it\_ \*\*b\*\*"),
    ("<script>", r"\<script\>"),
    ("a\nb\x1b", r"a\\nb\\x1b"),
    ("[x](y) `c` &lt; $x_$", r"\[x\](y) \`c\` \&lt; \$x\_\$"),
    ("אב", "\u2068אב\u2069"),
  ],
)
def test_plain_text_has_no_signs_of_markdown(raw, shown):
  assert markdown.plain(raw) == shown
  assert markdown.plain(markdown.plain(raw)) == shown


@pytest.mark.parametrize("raw", NASTY)
def test_code_is_closed_by_its_own_fence_only(raw):
  found = markdown.code(raw)
  fence = found[: len(found) - len(found.lstrip("`"))]
  if "`" not in raw:
    assert fence == "`"
  # CommonMark: a row of exactly as many backticks closes it; a space at both ends is dropped.
  inside = found[len(fence) : -len(fence)]
  assert fence not in {row for row in inside.replace(" ", "x").split("x")}
  assert "\n" not in inside and "\x1b" not in inside
  bare = inside[1:-1] if inside.startswith(" `") or inside.endswith("` ") else inside
  assert bare == raw.replace("\n", r"\n").replace("\x1b", r"\x1b")


@pytest.mark.parametrize("raw", NASTY)
def test_a_cell_stays_one_cell(raw):
  for value in (raw, markdown.code(raw), markdown.bold(raw)):
    assert "|" not in markdown.cell(value).replace(r"\|", "") and "\n" not in markdown.cell(value)


def test_a_name_of_the_hub_needs_no_quotes():
  assert markdown.scalar("org/base-1.5_B") == "org/base-1.5_B"
  for name in ("org/1: x", "1e5", "yes", "2026-03-01", "org/a\n", "-a/b"):
    assert json.loads(markdown.scalar(name)) == name.replace("\n", r"\n")


@pytest.mark.parametrize("raw", NASTY)
def test_quotes_and_words_are_read_back(raw):
  plain = raw.replace("\n", r"\n").replace("\x1b", r"\x1b")
  assert json.loads(markdown.quoted(raw)) == json.loads(markdown.scalar(raw)) == plain
  assert shlex.split(markdown.word(raw)) == [plain]
