"""done.json: whole or absent, and read strictly; the lock of a workdir."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import resource
import socket
import subprocess

import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.data import checksums
from instructjax.train import finished

TUNED = results.Tuned((results.Epoch(step=3, validation_loss=0.5, pretrain_loss=2.0),))
AGREEMENT = results.Agreement(0.75, 0.01, 0.2)
JUDGED = results.Judgement(
  accuracy=0.7,
  accuracy_stderr=0.01,
  pairs=40,
  prompts=12,
  score_std=2.0,
  calibration=results.Calibration((0.6, 0.8), (0.5, 1.0), (10, 30), 0.05),
)
RECORDS = (
  results.Nothing(),
  results.Pretrained(3.5),
  TUNED,
  results.Selected((results.ScoredEpoch(3, 0.5, 2.0, reward=-1.25),)),
  results.Collected(results.LabelerGroups(train=AGREEMENT, heldout=AGREEMENT), {"train": "12ab"}),
  results.RewardModel(1.5, JUDGED, None, ()),
  results.RewardModel(1.5, JUDGED, JUDGED, (results.Fold(heldout=0.6, train=0.7),)),
  results.Chosen(10, 2, reward=0.5, mean_reward=-0.5, kl=1.3, file="34cd"),
  results.Evaluated({"sft": {"reward": 0.5}, "base": {}}),
)


def done_of(result) -> finished.Done:
  stage = next(name for name, row in STAGES.items() if row.result is type(result))
  return finished.Done(stage, {"config.seed": "0"}, 3, result)


@pytest.mark.parametrize("result", RECORDS, ids=lambda record: type(record).__name__)
def test_done_is_read_as_it_was_written(tmp_path, result):
  assert finished.read_done(tmp_path / "stage") is None
  finished.write_done(tmp_path / "stage", done_of(result))
  assert finished.read_done(tmp_path / "stage") == done_of(result)
  assert [path.name for path in (tmp_path / "stage").iterdir()] == ["done.json"]


def test_every_stages_record_is_tried():
  assert {type(record) for record in RECORDS} == {row.result for row in STAGES.values()}


def test_a_bug_in_reading_is_not_another_versions_file(tmp_path, monkeypatch):
  def fail(*args):
    raise ValueError("a bug")

  finished.write_done(tmp_path, done_of(TUNED))
  monkeypatch.setattr(finished, "_typed", fail)
  with pytest.raises(ValueError, match="^a bug$") as raised:
    finished.read_done(tmp_path)
  assert type(raised.value) is ValueError


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_text", refuse)
  with pytest.raises(UserError, match="cannot write .*done.json: .*No space left on device.*make"):
    finished.write_done(tmp_path, done_of(TUNED))


def test_a_stage_without_checkpoints_has_no_step(tmp_path):
  done = finished.Done(finished.TOKENIZER, {"tokenizer": "ab"}, None, results.Nothing())
  finished.write_done(tmp_path, done)
  assert finished.read_done(tmp_path) == done


def test_an_empty_bin_stays_not_a_number(tmp_path):
  empty = results.Calibration((math.nan,), (math.nan,), (0,), 0.0)
  judged = dataclasses.replace(JUDGED, calibration=empty)
  finished.write_done(tmp_path, done_of(results.RewardModel(1.5, judged, None, ())))
  read = finished.read_done(tmp_path).result.validation.calibration
  assert math.isnan(read.confidence[0]) and read.count == (0,)


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda done: done.pop("step"), "missing key step"),
    (lambda done: done.update(epochs=[]), "unknown key epochs"),
    (lambda done: done.update({"a\n\x1b[31m": 1}), r"unknown key 'a\n\x1b[31m'."),
    (lambda done: done.update(stage="dpo"), "it names no stage, but 'dpo'"),
    (lambda done: done.pop("stage"), "it names no stage, but None"),
    (lambda done: done.update(stage="ppo"), "unknown key result.epochs"),
    (lambda done: done.update(step="3"), "step='3' is not of type <class 'int'>"),
    (lambda done: done.update(step=True), "step=True is not of type <class 'int'>"),
    (lambda done: done.update(result=[]), "result is no object"),
    (lambda done: done["fingerprint"].update(seed=0), "fingerprint.seed=0 is not of type"),
    (lambda done: done["fingerprint"].update({"\x1b[31m": 0}), r"fingerprint.\x1b[31m=0 is not"),
    (lambda done: done["result"]["epochs"][0].pop("step"), r"missing key result.epochs[0].step"),
    (
      lambda done: done["result"]["epochs"][0].update(loss=1.0, reward=1.0),
      "unknown key result.epochs[0].loss, result.epochs[0].reward",
    ),
  ],
)
def test_what_another_version_wrote_is_refused_by_name(tmp_path, change, words):
  finished.write_done(tmp_path, done_of(TUNED))
  path = tmp_path / "done.json"
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values))
  with pytest.raises(UserError) as error:
    finished.read_done(tmp_path)
  message = str(error.value)
  assert message.startswith(f"cannot read {path}: {words}"), message
  assert message.endswith("use another --workdir") and "\n" not in message


def test_what_starts_from_a_stage_knows_it_by_what_it_was_made_with():
  done, same = done_of(TUNED), dataclasses.replace(done_of(TUNED), step=1)
  other = dataclasses.replace(done, fingerprint={"config.seed": "1"})
  assert done.identity == same.identity != other.identity


def test_one_run_a_workdir(tmp_path):
  workdir = tmp_path / "runs"
  with finished.workdir_lock(workdir):
    with pytest.raises(UserError, match=f"in use by another run .process {os.getpid()} on "):
      with finished.workdir_lock(workdir):
        pass
  with finished.workdir_lock(workdir):
    (path,) = workdir.iterdir()
    # Of the holder alone: what the run before wrote is gone.
    assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


@pytest.mark.parametrize(
  ("old", "new", "words"),
  [
    ('{"a": 1, "b": 2}', '{"a": 1, "d": 5}', "b: 2 there, None here; d: None there, 5 here"),
    ('{"a": 1}', "5", "{'a': 1} there, 5 here"),
    ("5", '{"a": 1}', "5 there, {'a': 1} here"),
    ("xyz456789", "abcdefghij", "xyz45678, this run has abcdefgh"),
  ],
)
def test_what_differs_is_said_in_words(tmp_path, old, new, words):
  saved = {"config.rm": old, "same": "1"}
  finished.require_same_run(tmp_path, saved, dict(saved))
  with pytest.raises(UserError, match="another config.rm ") as error:
    finished.require_same_run(tmp_path, saved, saved | {"config.rm": new})
  assert f"({words})" in str(error.value)


def test_a_part_that_one_of_them_lacks_is_a_difference(tmp_path):
  parts = {"config.rm": "12345678", "data:prompts": "abcdefgh"}
  for saved, current, words in (
    (parts, {"config.rm": "12345678"}, "abcdefgh, this run has none"),
    ({"config.adapter": '{"rank": 2}'}, {}, "settings, this run has none"),
    ({}, {"config.adapter": '{"rank": 2}'}, "none, this run has settings"),
    ({"config.rm": "12345678"}, parts, "none, this run has abcdefgh"),
  ):
    with pytest.raises(UserError, match=rf"another \S+ .{words}"):
      finished.require_same_run(tmp_path, saved, current)


def test_what_must_have_finished_and_has_not_is_named(tmp_path):
  with pytest.raises(UserError, match="rm is not finished"):
    finished.require_done(tmp_path / "rm")
  done = finished.Done("collect", {}, None, results.Nothing())
  with pytest.raises(ValueError, match="collect keeps no checkpoints"):
    done.require_step()
  with pytest.raises(ValueError, match="collect does not say where it comes from"):
    done.require_provenance()
  assert dataclasses.replace(done, step=0).require_step() == 0  # a step, though it is false


HOSTILE = {
  "array": b"[]",
  "number": b"5",
  "null": b"null",
  "text": b'"sft"',
  "empty": b"",
  "no UTF-8": b'{"stage": "\xff"}',
  "zeros": bytes(100),
  "cut off": b'{"stage": "sft", "fing',
  "deep": b"[" * 100_000,
  "deep inside": b'{"stage": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
  "long": b'{"stage": "' + b"x" * 100_000 + b'"}',
  "long keys": b'{"stage": "sft", "' + b"x" * 100_000 + b'": 1}',
  "control characters": b'{"stage": "\\u001b[31m\\n"}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_another_shape_is_one_line(tmp_path, content):
  (tmp_path / "done.json").write_bytes(content)
  with pytest.raises(UserError) as error:
    finished.read_done(tmp_path)
  message = str(error.value)
  assert message.startswith(f"cannot read {tmp_path}/done.json: ")
  assert len(message) < 700 and message.isprintable(), message


@pytest.mark.parametrize(
  "key, value",
  [
    ("step", math.nan),
    ("step", 1e999),
    ("step", [3]),
    ("fingerprint", []),
    ("fingerprint", {"config.seed": None}),
    ("result", None),
    ("result", {"epochs": {"step": 3}}),
    ("result", {"epochs": [5]}),
    (
      "result",
      {"epochs": [{"step": 3, "validation_loss": 10**400, "pretrain_loss": 1.0}]},
    ),
    ("provenance", 5),
    ("provenance", {"version": "1"}),
  ],
)
def test_another_type_inside_is_one_line(tmp_path, key, value):
  finished.write_done(tmp_path, done_of(TUNED))
  path = tmp_path / "done.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  with pytest.raises(UserError, match=f"^cannot read {path}: .*{key}.*use another --workdir$"):
    finished.read_done(tmp_path)


def test_a_change_that_keeps_the_shape_is_noticed_and_the_advice_works(tmp_path):
  folder = tmp_path / "my run" / "sft"
  finished.write_done(folder, done_of(TUNED))
  path = folder / "done.json"
  text = path.read_text()
  path.write_text(json.dumps(json.loads(text)))  # the same content in another layout
  assert finished.read_done(folder) == done_of(TUNED)
  path.write_text(text.replace("0.5", "0.7"))
  with pytest.raises(UserError, match="^.*done.json has another content than was saved") as error:
    finished.read_done(folder)
  subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
  assert finished.read_done(folder) is None and folder.is_dir()


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
  try:
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/.lock: .*File too large"):
      with finished.workdir_lock(tmp_path):
        pass
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  with finished.workdir_lock(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff" * 1000)  # not what this program writes
    with pytest.raises(UserError, match="in use by another run") as error:
      with finished.workdir_lock(tmp_path):
        pass
  assert len(str(error.value)) < 600


def content(how, *texts):
  digests = tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)
  return checksums.Content(how, tuple(f"/data/{i}.parquet" for i in range(len(texts))), digests)


@pytest.mark.parametrize(
  ("made", "now", "told"),
  [
    (
      content("parquet:", "a", "b", "c"),
      content("parquet:", "a", "x", "c"),
      r"another content of /data/1.parquet \(sha256 3e23e816 there, 2d711642 here\)\. Put back what",
    ),
    (
      content("parquet:", *"abcdef"),
      content("parquet:", *"uvwxyz"),
      r"content of /data/0.parquet .*, /data/1.parquet .*, /data/2.parquet .* here\) and 3 more\. Put",
    ),
    (
      content("parquet:", "a", "b", "c"),
      content("parquet:", "a", "b"),
      r"with 3 files, where /data/0.parquet is now the first of 2\. Put back",
    ),
    (
      content("jsonl:", "a"),
      content("hh:", "a"),
      "0.parquet was read as jsonl: and is now read as",
    ),
    (content("demo 1"), content("hh:", "a"), r"with 0 files, where /data/0.parquet is now the fir"),
    (
      content("hh:", "a"),
      content("demo 1"),
      r"another data:prompts \(.*how: hh: there, demo 1 here",
    ),
  ],
)
def test_what_differs_between_contents_is_told_by_file(made, now, told):
  part = "data:prompts"
  compare = lambda a, b: finished.require_same_run(
    "run/ppo", {part: a.fingerprint}, {part: b.fingerprint}, {part: b.files}
  )
  compare(made, made)
  with pytest.raises(UserError, match=f"^cannot go on with run/ppo: .*{told}") as error:
    compare(made, now)
  assert "\n" not in str(error.value)
