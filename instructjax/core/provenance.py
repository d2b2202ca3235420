"""Where a result comes from: which code, command, data and machine made it, and when.

Made by a stage when it is finished, kept in its done.json, shown by the report and the model card. Imports no JAX:
devices come in as arguments.
"""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

import instructjax

LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "orbax-checkpoint")
_ROOT = pathlib.Path(__file__).parents[2]
_CODE = ("instructjax", "configs", "launch")  # what is seen to be changed
_GIT_SECONDS = 10  # on a slow network file system the commit is left out rather than waited for


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What a stage ran on.

  Attributes:
    device_kind: of the accelerator, as JAX names it: "NVIDIA H200", "TPU v5 lite", "cpu".
    num_devices: in the mesh, over all processes.
    num_processes: of the run.
    cpu: the host's model, of process 0.
    num_cpus: cores that process 0 may use.
  """

  device_kind: str
  num_devices: int
  num_processes: int
  cpu: str
  num_cpus: int


@dataclasses.dataclass(frozen=True)
class Provenance:
  """Where a result comes from.

  Attributes:
    version: of instructjax.
    commit: of its git checkout, with "+changes" where files differ from it; "" for an installed package.
    command: as it was typed.
    date: when it was finished, UTC, as 2026-03-01T12:00:00Z.
    seconds: that it took, wall clock.
    sources: kind of record ("documents", ...) -> "SPEC CHECKSUM", from data/checksums.py.
    hardware: what it ran on.
    libraries: name -> version, of those that numbers depend on; python among them.
  """

  version: str
  commit: str
  command: str
  date: str
  seconds: float
  sources: Mapping[str, str]
  hardware: Hardware
  libraries: Mapping[str, str]


def collect(
  sources: Mapping[str, str], devices: Sequence, num_processes: int, seconds: float
) -> Provenance:
  """The provenance of what this process has just finished.

  Args:
    sources: kind of record -> what the stage read, from `checksums.describe`.
    devices: jax devices of the mesh.
    num_processes: jax.process_count().
    seconds: that it took.
  """
  now = datetime.datetime.now(datetime.UTC)
  return Provenance(
    version=instructjax.__version__,
    commit=commit(_ROOT),
    command=command(sys.orig_argv),
    date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    seconds=round(seconds, 1),
    sources=dict(sources),
    hardware=Hardware(
      device_kind=devices[0].device_kind,
      num_devices=len(devices),
      num_processes=num_processes,
      cpu=cpu_model(),
      num_cpus=_num_cpus(),
    ),
    libraries={"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in LIBRARIES},
  )


def code(provenance: Provenance) -> str:
  """Version and, where there is one, commit."""
  commit_ = f", commit {provenance.commit}" if provenance.commit else ""
  return f"instructjax {provenance.version}{commit_}"


def rows(provenance: Provenance) -> list[tuple[str, str]]:
  """(name, value) for people to read, in the report and the model card."""
  made, machine = provenance, provenance.hardware
  processes = f", {machine.num_processes} processes" if machine.num_processes > 1 else ""
  return [
    ("code", code(made)),
    ("command", made.command),
    ("finished", f"{made.date}, after {made.seconds:.0f} s"),
    *made.sources.items(),
    (
      "hardware",
      f"{machine.num_devices} x {machine.device_kind}{processes}; {machine.num_cpus} cores of {machine.cpu}",
    ),
    ("libraries", ", ".join(f"{name} {version}" for name, version in made.libraries.items())),
  ]


def commit(root: pathlib.Path) -> str:
  """HEAD of the git checkout at `root`, "+changes" added where its code differs; "" where it is none.

  A package installed inside another project's checkout is none: that commit would say nothing of this code.
  """
  if not (root / ".git").exists():
    return ""
  try:
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
  except (
    OSError,
    subprocess.SubprocessError,
  ):  # no git, one that does not trust the folder, or a slow disk
    return ""
  return head + ("+changes" if changes else "")


def _git(root: pathlib.Path, *arguments: str) -> str:
  done = subprocess.run(
    ["git", "-C", str(root), *arguments],
    env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    capture_output=True,
    text=True,
    check=True,
    timeout=_GIT_SECONDS,
  )
  return done.stdout.strip()


def command(words: Sequence[str]) -> str:
  """A process's command line (sys.orig_argv) as it can be typed again: programs without their folders."""
  program, *rest = words
  if rest and pathlib.Path(rest[0]).name == "instructjax":  # the console script, which Python runs
    return shlex.join(["instructjax", *rest[1:]])
  return shlex.join(["python" if "python" in pathlib.Path(program).name else program, *rest])


def _num_cpus() -> int:
  if hasattr(os, "sched_getaffinity"):  # Linux: of a container's share, not of the machine
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu_model(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """The CPU's name; its architecture where the system does not tell the name."""
  try:
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:
    lines = []
  named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return next(iter(named), "") or platform.processor() or platform.machine()
