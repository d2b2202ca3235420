"""The record of where a result comes from: each part against what made it."""

import dataclasses
import datetime
import importlib.metadata
import subprocess
import types

import pytest

import instructjax
from instructjax.core import provenance

DEVICES = [types.SimpleNamespace(device_kind="NVIDIA H200")] * 2


def git(folder, *arguments):
  names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
  return subprocess.run(
    ["git", "-C", folder, *names, *arguments], check=True, capture_output=True, text=True
  ).stdout.strip()


def test_what_is_collected():
  before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
  found = provenance.collect(
    {"documents": provenance.Source("jsonl:a", "sha256:1")}, DEVICES, 3, 12.34
  )
  assert (found.version, found.seconds) == (instructjax.__version__, 12.3)
  assert found.sources == {"documents": provenance.Source("jsonl:a", "sha256:1")}
  date = datetime.datetime.strptime(found.date, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
  assert before <= date <= datetime.datetime.now(datetime.UTC)
  machine = found.hardware
  assert (machine.device_kind, machine.num_devices, machine.num_processes) == ("NVIDIA H200", 2, 3)
  assert machine.cpu and machine.num_cpus >= 1
  assert found.libraries["orbax-checkpoint"] == importlib.metadata.version("orbax-checkpoint")
  assert {"python", "jax", "jaxlib", "numpy", "flax", "optax", "sentencepiece"} <= {
    *found.libraries
  }


def test_the_versions_that_have_changed():
  before = {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6"}
  assert provenance.changed_versions(before, dict(before)) == ""
  now = {"python": "3.12.1", "jax": "0.10.2", "flax": "0.12"}
  assert provenance.changed_versions(before, now) == (
    "python 3.12.1 (was 3.11.7), flax 0.12 (was absent), numpy absent (was 2.4.6)"
  )
  assert [*provenance.versions()][:3] == ["instructjax", "python", "jax"]


def test_the_commit_of_a_checkout_and_whether_it_is_changed(tmp_path):
  assert provenance.commit(tmp_path) == ""  # what pip installs
  git(tmp_path, "init", "-q")
  (tmp_path / "instructjax").mkdir()
  (tmp_path / "instructjax" / "a.py").write_text("a = 1\n")
  assert provenance.commit(tmp_path) == ""  # no commit yet
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-q", "-m", "a")
  head = git(tmp_path, "rev-parse", "HEAD")
  (tmp_path / "notes.txt").write_text("changes no number")
  assert provenance.commit(tmp_path) == head
  (tmp_path / "instructjax" / "b.py").write_text("a new module does\n")
  assert provenance.commit(tmp_path) == head + "+changes"


def test_a_package_inside_anothers_checkout_has_no_commit(tmp_path):
  git(tmp_path, "init", "-q")
  git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a")
  (tmp_path / "site-packages").mkdir()
  assert provenance.commit(tmp_path / "site-packages") == ""


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
  (tmp_path / ".git").mkdir()
  monkeypatch.setenv("PATH", str(tmp_path))
  assert provenance.commit(tmp_path) == ""


@pytest.mark.parametrize(
  ("words", "typed"),
  [
    (
      ["/v/bin/python3", "-m", "instructjax.main", "--config=ppo"],
      "python -m instructjax.main --config=ppo",
    ),
    (
      ["/v/bin/python3", "/v/bin/instructjax", "run", "--config.data.prompts=a b"],
      "instructjax run '--config.data.prompts=a b'",
    ),
    (["/v/bin/pypy", "x.py"], "/v/bin/pypy x.py"),
  ],
)
def test_the_command_can_be_typed_again(words, typed):
  assert provenance.command(words) == typed


def test_the_cpu_by_its_name(tmp_path):
  (tmp_path / "cpuinfo").write_text(
    "processor\t: 0\nmodel name\t: EPYC 7B13\nmodel name\t: other\n"
  )
  assert provenance.cpu_model(tmp_path / "cpuinfo") == "EPYC 7B13"
  assert provenance.cpu_model(tmp_path / "none")  # the architecture


def test_what_people_read():
  hardware = provenance.Hardware("TPU v5 lite", 4, 2, "EPYC", 8)
  made = provenance.Provenance(
    version="1.2.3",
    commit="abc+changes",
    command="instructjax run",
    date="2026-03-01T12:00:00Z",
    seconds=61.2,
    sources={"prompts": provenance.Source("jsonl:p", "sha256:9")},
    hardware=hardware,
    libraries={"jax": "0.10", "numpy": "2"},
  )
  assert provenance.rows(made) == [
    ("code", "instructjax 1.2.3, commit abc+changes"),
    ("command", "instructjax run"),
    ("finished", "2026-03-01T12:00:00Z, after 61 s"),
    ("prompts", "jsonl:p sha256:9"),
    ("hardware", "4 x TPU v5 lite, 2 processes; 8 cores of EPYC"),
    ("libraries", "jax 0.10, numpy 2"),
  ]
  alone = dataclasses.replace(
    made, commit="", hardware=dataclasses.replace(hardware, num_processes=1)
  )
  assert dict(provenance.rows(alone))["code"] == "instructjax 1.2.3"
  assert dict(provenance.rows(alone))["hardware"] == "4 x TPU v5 lite; 8 cores of EPYC"
