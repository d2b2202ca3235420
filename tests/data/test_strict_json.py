import pytest

from instructjax.core.errors import UserError
from instructjax.data import strict_json


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"a": 1, "a": 2}', "has the key 'a' twice in one object"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    ('{"a": "\\ud800"}', "half of a surrogate pair"),
    ("{", "is not JSON: Expecting property name"),
  ],
)
def test_what_is_refused(tmp_path, content, message):
  (tmp_path / "a.json").write_text(content)
  with pytest.raises(UserError, match=message) as caught:
    strict_json.read(tmp_path / "a.json")
  assert str(caught.value).startswith(str(tmp_path / "a.json"))
  assert len(str(caught.value)) < len(str(tmp_path)) + 250 and "\n" not in str(caught.value)


def test_whole_pairs_are_read(tmp_path):
  (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude42"}')
  assert strict_json.read(tmp_path / "a.json") == {"a": "\U0001f642"}


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path):
  with open(tmp_path / "a.json", "wb") as file:
    file.truncate(2**30)  # takes no room
  with pytest.raises(UserError, match=r"has 1073741824 bytes, more than the 134217728"):
    strict_json.read(tmp_path / "a.json")


def test_quotes_are_a_part_of_a_line():
  assert strict_json.quote("a\n\x1b") == r"'a\n\x1b'"
  assert strict_json.quote({"a": "x" * 500}).endswith("xxx...")
  assert len(strict_json.quote(["x" * 500])) == 83
  assert strict_json.explain(ValueError("a\n\x1bb" + "c" * 500)) == "a b" + "c" * 157 + "..."


@pytest.mark.parametrize("value", [True, None, -1, 2**21, 2**31, 1.0, "1", [1]])
def test_what_is_no_id(value):
  with pytest.raises(UserError, match="F must be a token's id, a whole number from 0 to 2097151"):
    strict_json.token_id(value, "F")
  assert strict_json.token_id(2**21 - 1, "F") == 2**21 - 1
