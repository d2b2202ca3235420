"""Where the chat template is, compared with what transformers 5.23 does: PreTrainedTokenizerBase._from_pretrained reads
the files, get_chat_template chooses."""

import pytest

from instructjax.core.errors import UserError
from instructjax.data import chat_files


def find(folder, entry=None):
  where, template = chat_files.find(folder, folder / "tokenizer_config.json", entry)
  return where.relative_to(folder).as_posix(), template


TWO = {"tool_use": "x", "default": "two"}


@pytest.mark.parametrize(
  ("entry", "template"),
  [
    (None, None),
    ("one", "one"),
    ("", ""),
    (TWO, "two"),
    ([{"name": name, "template": text} for name, text in TWO.items()], "two"),
  ],
)
def test_an_entry_is_a_text_or_several_by_their_names(tmp_path, entry, template):
  assert find(tmp_path, entry) == ("tokenizer_config.json", template)


def test_files_win_over_the_entry(tmp_path):
  more = tmp_path / "additional_chat_templates"
  (tmp_path / "chat_template.jinja").write_text("three é")
  assert find(tmp_path, "one") == ("chat_template.jinja", "three é")
  more.mkdir()
  (more / "tool_use.jinja").write_text("x")
  (more / "notes.txt").write_text("x")
  assert find(tmp_path, TWO) == ("chat_template.jinja", "three é")
  (more / "default.jinja").write_text("four")
  assert find(tmp_path) == ("additional_chat_templates/default.jinja", "four")


def test_files_without_a_default_are_refused_although_there_is_an_entry(tmp_path):
  (tmp_path / "additional_chat_templates").mkdir()
  (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("x")
  with pytest.raises(
    UserError, match="must have a chat_template.jinja: .* templates 'rag' and no d"
  ):
    find(tmp_path, "one")


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (5, "must be text, got int"),
    (True, "must be text, got bool"),
    ([], "must have one named 'default', has none"),
    ({}, "must have one named 'default', has none"),
    ({"rag": "x"}, "must have one named 'default', has 'rag'$"),
    ({str(i): "x" for i in range(9)}, "has '0', '1', '2', '3', '4', [.]{3}$"),
    (["a"], "entry 1 must have a name and a template"),
    ([{"name": "default", "template": "x"}, {"template": "x"}], "entry 2 must have a name and a t"),
    ([{"name": ["default"], "template": "x"}], "entry 1 must have a name and a template"),
    ([{"name": "default"}], "'default' must be text, got none"),
    ({"default": {"a": 1}}, "'default' must be text, got dict"),
    ({"default": "x", "rag": 5}, "'rag' must be text, got int"),
    ({"default" * 1000: 5}, "chat_template 'default.{33}' must be text"),
  ],
)
def test_an_entry_of_another_form_is_one_line_with_the_file(tmp_path, entry, message):
  with pytest.raises(UserError, match=rf"^{tmp_path}/tokenizer_config.json: .*{message}") as error:
    find(tmp_path, entry)
  assert "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
  (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
  with pytest.raises(UserError, match=r"chat_template.jinja is not UTF-8 \(byte 2\)"):
    find(tmp_path)


def test_a_clock_is_read_as_it_was_written(tmp_path):
  assert chat_files.read_clock(tmp_path) is None
  chat_files.write_clock(tmp_path, "2026-03-01T12:00:00")
  assert chat_files.read_clock(tmp_path) == "2026-03-01T12:00:00"
  (tmp_path / "chat_clock.txt").write_text("yesterday")
  with pytest.raises(UserError, match="chat_clock.txt must hold the date and time of the run's"):
    chat_files.read_clock(tmp_path)
