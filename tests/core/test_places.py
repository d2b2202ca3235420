"""Paths that a user gives: what is expanded, and what is refused in one line."""

import os
import pathlib

import pytest

from instructjax.core import places
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from tests.core.plain import changed

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
  "text, expected",
  [
    ("", ""),
    ("a/b", "a/b"),
    ("~/a", f"{HOME}/a"),
    ("~root/a", f"{os.path.expanduser('~root')}/a"),
    ("a/~/b", "a/~/b"),
    ("hf://a/b", "hf://a/b"),
    ("naïve/数据", "naïve/数据"),
  ],
)
def test_expanded(text, expected):
  assert places.expand(text, "--checkpoint", ("hf://",)) == expected


NO_PATHS = [
  ("a\0b", "control character"),
  ("a\nb", "control character"),
  ("a\udcffb", "control character or other bytes"),
  ("gs://bucket/run", "gs:// is not read or written"),
  ("s3://bucket/run", "s3:// is not"),
  ("~nobody-of-this-name/a", "there is no such user"),
  ("a" * 300, "too long"),
  ("a/" * 3000, "too long"),
]


@pytest.mark.parametrize("text, reason", NO_PATHS)
def test_what_can_be_no_path_is_one_short_line(text, reason):
  with pytest.raises(UserError, match=reason) as refused:
    places.expand(text, "--checkpoint", ("hf://",))
  line = str(refused.value)
  assert line.isprintable() and len(line) < 400


FIELDS = [
  "tokenizer__path",
  "model__weights",
  "reward_model__weights",
  *(f"data__{kind}" for kind in ("documents", "demonstrations", "comparisons", "prompts")),
]


def value(config, field: str) -> str:
  block, name = field.split("__")
  return getattr(getattr(config, block), name)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_names_a_place_is_expanded_and_checked(field):
  scheme = "jsonl:" if field.startswith("data") else ""
  config = from_config_dict(changed(**{field: f"{scheme}~/x"}))
  assert value(config, field) == f"{scheme}{HOME}/x"
  for text, reason in NO_PATHS:
    with pytest.raises(UserError, match=reason):
      from_config_dict(changed(**{field: scheme + text}))


def test_a_workdir_may_be_new_and_below_the_home(tmp_path):
  assert places.require_workdir(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
  assert places.require_workdir("~/runs") == pathlib.Path(HOME).resolve() / "runs"
  assert places.require_workdir("runs") == pathlib.Path.cwd() / "runs"


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_workdir_must_be_given(text):
  with pytest.raises(UserError, match="--workdir must have a value, as runs/demo"):
    places.require_workdir(text)


def test_what_can_be_no_workdir_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
  for text, reason in (
    (tmp_path / "file", "must be a folder, and .* is a file"),
    (tmp_path / "file" / "run", "must be a folder, and .*Not a directory"),
    (tmp_path / "loop", "loop of symbolic links"),
    (tmp_path / "loop" / "run", "loop of symbolic links"),
    *NO_PATHS,
  ):
    with pytest.raises(UserError, match=reason) as refused:
      places.require_workdir(str(text))
    assert str(refused.value).startswith("--workdir=") and str(refused.value).isprintable()
  assert places.require_workdir(str(tmp_path / "nowhere")) == tmp_path / "gone"
  with pytest.raises(UserError, match="^--scratch=.*/file must be a folder"):
    places.require_workdir(str(tmp_path / "file"), "--scratch")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(UserError, match="you may not write in"):
    places.require_workdir(str(tmp_path / "run"))


def test_a_workdir_in_a_bucket(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/c")
  assert places.bucket_of("runs/demo", None) is None and places.bucket_of(None, None) is None
  assert places.bucket_of("gs://my-bucket/a/b/", None) == (
    "gs://my-bucket/a/b",
    "/c/instructjax/my-bucket/a/b",
  )
  assert places.bucket_of("gs://b12/a", "/s") == ("gs://b12/a", "/s")
  assert places.bucket_of("gs://b12/a", "") == ("gs://b12/a", ""), (
    "it is given, and refused as empty"
  )


@pytest.mark.parametrize(
  "text, scratch, message",
  [
    ("gs://bucket", None, "must be gs://BUCKET/FOLDER"),
    ("gs://bucket/a b", None, "must be gs://BUCKET/FOLDER"),
    ("gs://bucket/../a", None, "must be gs://BUCKET/FOLDER"),
    ("gs://B/\x1b[2J", None, "must be gs://BUCKET/FOLDER"),
    ("runs/demo", "/s", "--scratch goes with --workdir=gs://"),
  ],
)
def test_no_workdir_in_a_bucket(text, scratch, message):
  with pytest.raises(UserError, match=message) as refused:
    places.bucket_of(text, scratch)
  assert str(refused.value).isprintable()
