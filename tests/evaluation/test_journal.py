"""Results survive a kill; what was made with something else is refused."""

import contextlib

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import journal
from instructjax.evaluation.task import Choices, Question
from tests.evaluation.fake import choice


@contextlib.contextmanager
def opened(files):
  found = journal.Journal(files.journal)
  yield found
  found.close()


ASKS = (Choices((("a", " b"), ("a", " c"))), Question("q", 4))


@pytest.fixture
def files(tmp_path):
  return journal.part(tmp_path, "sft", "hellaswag", "zero_shot")


def test_a_result_is_kept_as_soon_as_it_is_added(files):
  with opened(files) as first:
    first.add(0, 1, choice(-0.5, -1.25, is_cut=True))
    first.add(1, 0, "an answer\u2028with odd ends")
    # Read before it is closed, as a killed process leaves it, with half a line at the end.
    left = files.journal.read_bytes()
  files.journal.write_bytes(left + b'[0, 0, {"log_prob": -1')
  with opened(files) as again:
    assert (again.choices, again.texts) == (first.choices, first.texts)
    assert again.missing(ASKS) == [(0, 0)]
    again.add(0, 0, choice(-2.0))
    assert again.answer(0, ASKS[0]) == [choice(-2.0), choice(-0.5, -1.25, is_cut=True)]
    assert again.answer(1, ASKS[1]) == "an answer\u2028with odd ends"
  with opened(files) as whole:
    assert whole.missing(ASKS) == []


def test_a_run_that_goes_on_has_the_numbers_of_one_that_was_not_stopped(files):
  with opened(files) as first:
    first.add(0, 0, choice(-1 / 3, -2 / 3))
    unstopped = first.choices
  with opened(files) as again:
    assert again.choices == unstopped


@pytest.mark.parametrize("text", ["[]", "5", "null", "{"])
def test_a_damaged_file_of_settings_is_another(files, text):
  journal.write_json(files.made_with, {"model": "1"})
  files.made_with.write_text(text)
  with pytest.raises(UserError, match="made with another model"):
    journal.require_same(files, {"model": "1"}, redo=False, title="sft")


@pytest.mark.parametrize("line", [b"\xff", b"[0, 0]", b"[0, 0, {}]", b'{"a": 1}', b"7"])
def test_a_damaged_line_is_asked_again(files, line):
  files.journal.parent.mkdir(parents=True)
  files.journal.write_bytes(line + b'\n[1, 0, "x"]\n')
  with opened(files) as found:
    assert found.missing(ASKS) == [(0, 0), (0, 1)]


def test_other_settings_are_refused_or_replaced(files):
  made_with = {"model": "1", "data": "2"}
  journal.require_same(files, made_with, redo=False, title="sft")
  journal.write_samples(files, [{"number": 0}])
  journal.require_same(files, made_with, redo=False, title="sft")
  with pytest.raises(UserError, match="made with another data; give another --out, or --redo"):
    journal.require_same(files, made_with | {"data": "3"}, redo=False, title="sft")
  assert files.samples.exists()
  journal.require_same(files, made_with | {"data": "3"}, redo=True, title="sft")
  assert not files.samples.exists()
  files.made_with.write_text("{")
  with pytest.raises(UserError, match="another model and another data"):
    journal.require_same(files, made_with, redo=False, title="sft")


def test_samples_are_read_back_or_said_to_be_damaged(files):
  samples = [{"number": 0, "text": "\u2028ü"}, {"number": 1}]
  files.samples.parent.mkdir(parents=True)
  files.journal.write_text("")
  journal.write_samples(files, samples)
  assert journal.read_samples(files, 2, "sft") == samples and not files.journal.exists()
  with pytest.raises(UserError, match="is damaged; delete it"):
    journal.read_samples(files, 3, "sft")
  files.samples.write_text("{\n")
  with pytest.raises(UserError, match="is damaged; delete it"):
    journal.read_samples(files, 1, "sft")
