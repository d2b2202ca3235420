"""Files of other programs as hostile input: every answer is a value or one line that names the file and the key."""

import json
import math
import os
import pathlib
import time

import pytest

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys


@pytest.fixture
def path(tmp_path):
  return tmp_path / "config.json"


def refusal(path, content: bytes | None = None) -> str:
  if content is not None:
    path.write_bytes(content)
  start = time.perf_counter()
  with pytest.raises(UserError) as error:
    foreign.read_json(path)
  assert time.perf_counter() - start < 5
  message = str(error.value)
  assert str(path.parent) in message and message.isprintable() and len(message) < 400
  return message


def test_read(path):
  path.write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}], "c": "\xc3\xa9", "c": "\xc3\xa9"}')
  assert foreign.read_json(path) == {"a": [1, {"b": None}], "c": "é"}


def test_whole_pairs_are_read(path):
  path.write_text('{"a": "\\ud83d\\ude42"}')
  assert foreign.read_json(path) == {"a": "\U0001f642"}


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "must be JSON: Expecting value (line 1, column 1)"),
    (b'{\n"a": ', "must be JSON: Expecting value (line 2, column 6)"),
    (b"[1]", "must be a JSON object, and it is [1]"),
    (b"null", "must be a JSON object, and it is None"),
    (b'"' + b"x" * 10_000 + b'"', "must be a JSON object, and it is 'xxx"),
    (b'{"a": "\xff"}', "must be JSON: it is not UTF-8 (byte 8)"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 32 levels deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice, with two values"),
    (b'{"x": {"a": 1, "a": true, "a": 2}}', "the key 'a' is there twice"),
    (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
  ],
)
def test_refused(path, content, message):
  assert message in refusal(path, content)


def test_what_is_no_file(path, tmp_path):
  assert refusal(path) == f"{tmp_path} has no config.json"
  path.mkdir()
  assert "must be a file, and it is a folder, a pipe or a device" in refusal(path)
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)  # to open it would wait for a writer
  assert "must be a file" in refusal(pipe)
  loop = tmp_path / "loop"
  loop.symlink_to(loop)
  with pytest.raises(UserError, match="loop cannot be read: Too many levels"):
    foreign.require_file(loop)
  with pytest.raises(UserError, match="/dev/null must be a file"):
    foreign.require_file(pathlib.Path("/dev/null"))
  with pytest.raises(UserError, match="must be a file"):
    foreign.require_file(pathlib.Path(""))
  for name in ("x" * 5000, "a\0b", "\ud800"):
    with pytest.raises(UserError) as error:
      foreign.require_file(tmp_path / name)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_too_large(path):
  with open(path, "wb") as file:
    file.truncate(2**30)  # takes no room
  with pytest.raises(UserError, match="more than 134 MB, too much for such a file"):
    foreign.read_text(path, foreign.TOKENIZER_BYTES)
  path.write_bytes(b'{"a": 1}')
  with pytest.raises(UserError, match="more than 0 MB, too much for such a file"):
    foreign.read_json(path, limit=7)
  assert foreign.read_json(path, limit=8) == {"a": 1}


VALUES = (
  None,
  True,
  0,
  -1,
  1.5,
  math.nan,
  math.inf,
  10**400,
  2**31,
  "",
  "x",
  [],
  [1],
  {},
  {"a": 1},
)
GETTERS = {
  "size": (lambda keys: keys.size("key", 7), {None: 7}),
  "number": (
    lambda keys: keys.number("key", 7.0),
    {None: 7.0, 0: 0.0, -1: -1.0, 1.5: 1.5, 2**31: 2.0**31},
  ),
  "flag": (lambda keys: keys.flag("key", False), {None: False, True: True}),
  "text": (lambda keys: keys.text("key", "d"), {None: "d", "": "", "x": "x"}),
  "one_of": (lambda keys: keys.one_of("key", ("x", "y"), "y"), {None: "y", "x": "x"}),
}


@pytest.mark.parametrize("getter", GETTERS)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_a_value_or_one_line(getter, value):
  get, right = GETTERS[getter]
  keys = Keys({"key": value}, "FILE")
  # By identity of type too: True is 1 to a dict.
  answers = [
    answer for given, answer in right.items() if given == value and type(given) is type(value)
  ]
  if answers:
    assert get(keys) == answers[0] and type(get(keys)) is type(answers[0])
    return
  with pytest.raises(UserError, match=r"^FILE: key=") as error:
    get(keys)
  assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_lists_and_blocks():
  keys = Keys({"a": ["x", "y"], "b": {"c": 1}, "n": None, "bad": ["x", 1]}, "FILE")
  assert keys.texts("a") == ["x", "y"] and keys.texts("n") == keys.texts("absent") == []
  assert keys.block("b").size("c", None) == 1 and keys.block("n") is keys.block("absent") is None
  with pytest.raises(UserError, match=r"FILE: bad=\['x', 1\] must be a list of texts"):
    keys.texts("bad")
  with pytest.raises(UserError, match="^FILE: b lacks 'd'$"):
    keys.block("b").number("d", None)
  with pytest.raises(UserError, match=r"^FILE: a: \['x', 'y'\] must be a JSON object$"):
    keys.block("a")


def test_refuse():
  keys = Keys({"a": 0, "b": {"x": [1] * 10_000}, "n": None}, "FILE")
  keys.refuse("a", 0, 1)
  keys.refuse("n", 5)
  keys.refuse("absent")
  with pytest.raises(UserError, match="^FILE: a=0 is not supported, only 5 or 6$"):
    keys.refuse("a", 5, 6)
  with pytest.raises(
    UserError, match=r"^FILE: b=\{'x': \[1, 1, 1, 1, 1, 1, \.\.\.\]\} is not supp"
  ):
    keys.refuse("b")


def test_quotes_are_short_and_printable():
  for value in (
    "x" * 10**6,
    "\x1b[31m\n\u202e",
    ["y" * 10**5] * 10**5,
    json.loads("[" * 900 + "]" * 900),
  ):
    text = foreign.shown(value)
    assert len(text) <= 80 and text.isprintable()
  assert foreign.shown("a") == "'a'"
  assert foreign.named("model.norm.weight") == "model.norm.weight"
  assert foreign.named("a\nb") == "'a\\nb'" and foreign.named("") == "''"
  assert len(foreign.named("x" * 1000)) <= 100
  assert foreign.shown("a\n\x1b") == r"'a\n\x1b'"
  long = ValueError("a\n\x1bb" + "c" * 500)
  assert foreign.explained(long) == r"a \x1bb" + "c" * 150 + "..."


@pytest.mark.parametrize("value", [True, None, -1, 2**21, 2**31, 1.0, "1", [1]])
def test_what_is_no_id(value):
  with pytest.raises(UserError, match="F must be a token's id, a whole number from 0 to 2097151"):
    foreign.token_id(value, "F")
  assert foreign.token_id(2**21 - 1, "F") == 2**21 - 1
