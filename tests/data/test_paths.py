import os

import pytest

from instructjax.core.errors import UserError
from instructjax.data import paths


def test_home_globs_and_plain_paths(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("b.jsonl", "a.jsonl", "[x].jsonl"):
    (tmp_path / name).touch()
  assert paths.matches("~/[ab].jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
  assert paths.matches("~/[x].jsonl") == [f"{tmp_path}/[x].jsonl"]  # there is such a file
  assert paths.matches("~/no") == [f"{tmp_path}/no"]
  assert paths.matches("~/no*") == []


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/null", ""])
def test_what_is_no_file_is_refused(path):
  with pytest.raises(UserError, match="^cannot read "):
    paths.require_file(path)


def test_a_circle_of_links_is_refused(tmp_path):
  os.symlink(tmp_path / "b", tmp_path / "a")
  os.symlink(tmp_path / "a", tmp_path / "b")
  with pytest.raises(UserError, match="Too many levels of symbolic links"):
    paths.require_file(str(tmp_path / "a"))
