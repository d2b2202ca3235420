"""Processes that are not the same: each is told the same line, which names the process, the fact and both values."""

import dataclasses
import json
import pathlib
import shutil
import threading
from unittest import mock

import pytest

import instructjax
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from instructjax.parallel import agreement
from tests.core.plain import changed
from tests.parallel.store import teams


def told(*facts: dict) -> list[str]:
  """What each process is told when they compare these facts; '' if nothing."""
  ends = [""] * len(facts)

  def one(team, own):
    try:
      agreement.require_same(team, "facts", own)
    except UserError as error:
      ends[team.process] = str(error)

  threads = [
    threading.Thread(target=one, args=pair) for pair in zip(teams(len(facts)), facts, strict=True)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  return ends


def of_config(**changes) -> dict:
  return agreement.settings(from_config_dict(changed(**changes)))


@pytest.mark.parametrize(
  "changes, field, here, there",
  [
    ({"sft__optim__learning_rate": 5e-3}, "sft.optim.learning_rate", "0.005", None),
    ({"sft__optim__schedule": "linear"}, "sft.optim.schedule", "'linear'", "'cosine'"),
    ({"ppo__batch_size": 256}, "ppo.batch_size", "256", "128"),
    ({"seed": 7}, "seed", "7", "0"),
  ],
)
def test_another_setting_is_told_to_all(changes, field, here, there):
  usual = of_config()
  (line,) = set(told(usual, of_config(**changes)))
  there = there or usual[f"config.{field}"]
  assert f"config.{field} is {here} on process 1 and {there} on process 0" in line


def test_the_same_settings_go_on():
  assert told(of_config(), of_config(), of_config()) == ["", "", ""]


def test_places_on_a_hosts_disk_may_differ():
  places = dict(tokenizer__path="/b", model__weights="/b/w", data__prompts="jsonl:/b/p.jsonl")
  assert told(of_config(), of_config(**places)) == ["", ""]


def test_all_use_the_names_of_process_0s_places():
  first, second = teams(2)
  config = lambda place: from_config_dict(changed(data__prompts=f"jsonl:/{place}/p", seed=3))
  assert agreement.with_first_places(None, config("a")) == config("a")
  assert agreement.with_first_places(first, config("a")) == config("a")
  assert agreement.with_first_places(second, config("b")) == config("a")


def test_of_a_file_the_content_counts_and_the_path_is_shown():
  assert told({"data": "sha256:" + "a" * 64 + "\t/x"}, {"data": "sha256:" + "a" * 64 + "\t/y"}) == [
    "",
    "",
  ]
  (line,) = set(
    told({"data": "sha256:" + "a" * 64 + "\t/x"}, {"data": "sha256:" + "b" * 64 + "\t/x"})
  )
  assert (
    "data is sha256:bbbbbbbbbbbb (/x) on process 1 and sha256:aaaaaaaaaaaa (/x) on process 0"
    in line
  )


def test_most_are_right():
  (line,) = set(
    told({"seed": "1"}, {"seed": "0"}, {"seed": "0"}, {"seed": "1", "x": "2"}, {"seed": "0"})
  )
  assert "seed is 1 on processes 0, 3 and 0 on process 1; 1 more differ, as x" in line


def test_another_file_of_the_code_is_named(tmp_path):
  copy = tmp_path / "instructjax"
  source = pathlib.Path(instructjax.__file__).parent
  shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
  (copy / "ops" / "kl.py").write_text("# changed\n")
  usual = agreement.code()
  with mock.patch.object(instructjax, "__file__", str(copy / "__init__.py")):
    other = agreement.code()
  line = agreement.difference({0: usual, 1: other})
  assert "code instructjax/ops/kl.py is " in line and "more differ" not in line
  assert len(json.dumps(usual)) < 20_000  # kilobytes a process


def test_libraries_and_environment_are_facts():
  assert agreement.libraries()["version of numpy"]
  assert agreement.environment({"XLA_FLAGS": "--a", "HOME": "/x"})["variable XLA_FLAGS"] == "--a"
  assert "variable HOME" not in agreement.environment({"HOME": "/x"})
  assert agreement.environment({})["jax_enable_x64"] == "False"


def workdirs_told(*folders: pathlib.Path) -> list[str]:
  """What each process is told whose workdir is given; '' if nothing."""
  ends = [""] * len(folders)

  def one(team, folder):
    try:
      agreement.require_one_workdir(team, folder)
    except UserError as error:
      ends[team.process] = str(error)

  pairs = zip(teams(len(folders)), folders, strict=True)
  threads = [threading.Thread(target=one, args=pair) for pair in pairs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  return ends


def test_a_workdir_must_be_one_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(agreement, "_SHARED_SECONDS", 0.2)
  first, other = tmp_path / "a", tmp_path / "b"
  assert workdirs_told(first, first) == ["", ""]
  assert not list(first.iterdir())
  for is_there in (False, True):
    if is_there:  # perhaps with what a killed run left
      other.mkdir()
      (other / ".together").write_text("0123456789abcdef")
    (line,) = set(workdirs_told(first, other))
    assert f"is another folder ({other}) on process 1" in line
    assert not list(first.iterdir())


def test_a_workdir_that_cannot_be_written_is_told_to_all(tmp_path):
  (tmp_path / "file").touch()
  workdir = tmp_path / "file" / "run"
  assert set(workdirs_told(workdir, workdir)) == {f"{workdir} cannot be written: Not a directory"}


def test_one_process_agrees_with_itself(tmp_path):
  agreement.require_same(None, "facts", {})
  agreement.require_one_workdir(None, tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_every_field_but_places_is_a_fact():
  config = from_config_dict(changed())
  facts = of_config()
  assert {
    "config.guard.stuck_factor",
    "config.mesh.fsdp",
    "config.model.rope_scaling.kind",
  } <= facts.keys()
  assert not any(field.name in {"documents", "prompts"} for field in dataclasses.fields(config))
  assert "config.data.documents" not in facts and "config.model.weights" not in facts


def test_all_processes_follow_what_the_first_says_under_each_number():
  """Slow followers too: the first may be a number ahead only after all have asked for the last."""
  heard, barrier = {0: [], 1: [], 2: []}, threading.Barrier(3)

  def one(team):
    for number in (4, 5, 6):
      said = f"said {number}" if team.process == 0 else ""
      heard[team.process].append(agreement.follow_first(team, "rewards", number, said))
      barrier.wait(60)

  threads = [threading.Thread(target=one, args=(team,)) for team in teams(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  assert set(map(tuple, heard.values())) == {("said 4", "said 5", "said 6")}
