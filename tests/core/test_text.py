"""What becomes of characters that a terminal obeys or that reorder a line."""

import json
import unicodedata

import pytest

from instructjax.core import text


@pytest.mark.parametrize(
  ("raw", "shown"),
  [
    ("\x1b[31mred", r"\x1b[31mred"),
    ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),  # writes to the clipboard
    ("100%\rdone\x08", r"100%\rdone\x08"),
    ("\x9b2J\x7f\x00", r"\x9b2J\x7f\x00"),
    ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
    ("\udcff", r"\udcff"),
    ("é 日本 שלום 🙂 a\u200db", "é 日本 שלום 🙂 a\u200db"),
  ],
)
def test_what_a_terminal_obeys_is_shown(raw, shown):
  assert text.printable(raw) == text.printable_lines(raw) == shown


def test_lines_and_marks_of_direction_may_stay():
  raw = "a\n\tb\u200f"
  assert text.printable(raw) == r"a\n\tb\u200f"
  assert text.printable_lines(raw) == raw


def test_no_control_character_is_forgotten():
  for code in [*range(0x3000), *range(0xD7F0, 0xE010)]:
    character = chr(code)
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    assert (text.printable(character) != character) == (
      is_control
      or unicodedata.bidirectional(character) in _DIRECTIONS
      or code in (0x61C, 0x200E, 0x200F)
    ), hex(code)


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_every_right_to_left_letter_is_isolated():
  for code in range(0x20000):
    character = chr(code)
    if unicodedata.bidirectional(character) in ("R", "AL") and code not in (0x61C, 0x200F):
      assert text.isolated(f"a{character}") == f"\u2068a{character}\u2069", hex(code)
  assert text.isolated("a é 日\u202e") == r"a é 日\u202e"


def test_json_that_may_be_printed_is_the_same_value():
  value = {"é\x1b": ["\x7f\x9b\u202e\u2028", "\ud800", '"\\\n日']}
  line = text.json_line(value)
  assert json.loads(line) == value
  assert line == r'{"é\u001b": ["\u007f\u009b\u202e\u2028", "\ud800", "\"\\\n日"]}'
