"""The load test of the labeling application, for two labelers and a second, with the server killed."""

import random

from benchmarks import labeling
from tests.labels import app


def test_nothing_that_was_acknowledged_is_lost(capsys):
  assert labeling.main(["--seconds=1", "--labelers=2", "--pause=0.02"]) == 0
  said = capsys.readouterr().out
  assert "2 labelers, 1 s, pauses of 0.02 s, killed in the middle" in said
  assert "lost 0, doubled 0" in said and "acknowledged 0" not in said


def test_a_lost_submission_is_found(tmp_path, capsys):
  app.make_project(tmp_path, [app.item()]).close()
  seen = labeling.Seen(acknowledged=["a token that the database does not have"])
  args = labeling.parse(["--no-kill"])
  assert labeling.report(str(tmp_path), [seen], args) == 1
  assert "acknowledged 1, in the database 0, lost 1, doubled 0" in capsys.readouterr().out


def test_forms_are_whole():
  html = (
    '<input name="7.overall"><input name="7.sexual"><textarea name="7.note"><select name="7.rank">'
  )
  filled = labeling.filled(html, random.Random(0))
  assert filled.keys() == {"7.overall", "7.sexual", "7.note", "7.rank"}
  assert filled["7.sexual"] == "no" and 1 <= int(filled["7.rank"]) <= 4


def test_quantiles():
  times = [float(i) for i in range(1, 101)]
  assert (labeling.q(times, 0.5), labeling.q(times, 0.95), labeling.q(times, 1)) == (51, 96, 100)


def test_a_labeler_who_cannot_go_on_is_found(monkeypatch, capsys):
  def fall(*args):
    raise TimeoutError("no answer")

  monkeypatch.setattr(labeling, "work", fall)
  assert labeling.main(["--seconds=1", "--labelers=2", "--no-kill"]) == 1
  assert "not answered as they should: 2 [\"labeler0: TimeoutError('no answer')\"" in (
    capsys.readouterr().out
  )
