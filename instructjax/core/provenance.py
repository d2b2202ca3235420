"""The provenance of a result: which code, command, data and machine produced it, and when.

A stage collects it when it is finished and saves it in its done.json. The report and the model card show it. This
module does not import JAX; it gets devices as arguments.
"""

import contextlib
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

# Distributions that results, or the files that a run leaves, may depend on.
LIBRARIES = (
  *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy", "ml-dtypes"),
  *("flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "array-record"),
  *("sentencepiece", "tokenizers", "jinja2", "pyarrow", "datasets"),
)
_ROOT = pathlib.Path(__file__).parents[2]
# Folders whose uncommitted changes are noted beside the commit. Documents and tests do not influence results.
_CODE = ("instructjax", "configs", "launch")
# Time limit of one git command. On a slow network file system it is better to record no commit than to wait for it.
_GIT_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Hardware:
  """The machine that a stage ran on.

  Attributes:
    device_kind: JAX's name of the accelerator: "NVIDIA H200", "TPU v5 lite", "cpu".
    num_devices: devices in the mesh, over all processes.
    num_processes: processes of the run.
    cpu: model name of process 0's CPU.
    num_cpus: cores that process 0 may use.
  """

  device_kind: str
  num_devices: int
  num_processes: int
  cpu: str
  num_cpus: int


@dataclasses.dataclass(frozen=True)
class Source:
  """A source of records.

  Attributes:
    spec: SCHEME:REST as in the config.
    checksum: what its content is recognised by; in words why there is none, if it could not be computed.
  """

  spec: str
  checksum: str


@dataclasses.dataclass(frozen=True)
class Provenance:
  """The provenance of one stage's result.

  Attributes:
    version: version of instructjax.
    commit: commit of its git checkout, with "+changes" if the code differs from it; "" for an installed package.
    command: the command line as it can be typed again.
    date: when the stage was finished, in UTC, such as 2026-03-01T12:00:00Z.
    seconds: wall-clock time that the stage took.
    sources: kind of record ("documents", ...) -> what the stage read.
    hardware: the machine it ran on.
    libraries: name -> version of Python and of the libraries that results depend on.
  """

  version: str
  commit: str
  command: str
  date: str
  seconds: float
  sources: Mapping[str, Source]
  hardware: Hardware
  libraries: Mapping[str, str]


def collect(
  sources: Mapping[str, Source], devices: Sequence, num_processes: int, seconds: float
) -> Provenance:
  """Collects the provenance of a stage that this process has just finished.

  Args:
    sources: kind of record -> what the stage read.
    devices: JAX devices of the mesh.
    num_processes: jax.process_count().
    seconds: wall-clock time that the stage took.
  """
  now = datetime.datetime.now(datetime.UTC)
  return Provenance(
    version=instructjax.__version__,
    commit=commit(_ROOT),
    # Not sys.argv, which lacks the interpreter and `-m MODULE`.
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
    libraries=libraries(),
  )


def libraries() -> dict[str, str]:
  """The versions of Python and of the libraries that results depend on, name -> version, of those installed."""
  result = {"python": platform.python_version()}
  for name in LIBRARIES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      result[name] = importlib.metadata.version(name)
  return result


def versions() -> dict[str, str]:
  """`libraries`, and the version of instructjax before them."""
  return {"instructjax": instructjax.__version__} | libraries()


def changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
  """The libraries whose versions differ, as `jax 0.12.0 (was 0.10.2), numpy 2.5 (was 2.4)`; "" if none does."""
  names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
  return ", ".join(
    f"{name} {now.get(name, 'absent')} (was {before.get(name, 'absent')})" for name in names
  )


def code(provenance: Provenance) -> str:
  """The version and, for a checkout, the commit, in words."""
  commit_ = f", commit {provenance.commit}" if provenance.commit else ""
  return f"instructjax {provenance.version}{commit_}"


def rows(provenance: Provenance) -> list[tuple[str, str]]:
  """The (name, value) rows that the report and the model card show."""
  made, machine = provenance, provenance.hardware
  processes = f", {machine.num_processes} processes" if machine.num_processes > 1 else ""
  return [
    ("code", code(made)),
    ("command", made.command),
    ("finished", f"{made.date}, after {made.seconds:.0f} s"),
    *((kind, f"{source.spec} {source.checksum}") for kind, source in made.sources.items()),
    (
      "hardware",
      f"{machine.num_devices} x {machine.device_kind}{processes}; {machine.num_cpus} cores of {machine.cpu}",
    ),
    ("libraries", ", ".join(f"{name} {version}" for name, version in made.libraries.items())),
  ]


def commit(root: pathlib.Path) -> str:
  """The commit of the git checkout at `root`, with "+changes" appended if its code has uncommitted changes.

  It is "" if `root` is not the top of a checkout or git fails.
  """
  # `git rev-parse` would also search the parent folders. It would then report the commit of another project in whose
  # checkout this package happens to be installed.
  if not (root / ".git").exists():
    return ""
  try:
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
  except (OSError, subprocess.SubprocessError):
    # Git is not installed, does not trust the folder's owner, or took too long.
    return ""
  return head + ("+changes" if changes else "")


def _git(root: pathlib.Path, *arguments: str) -> str:
  done = subprocess.run(
    ["git", "-C", str(root), *arguments],
    # `git status` would otherwise refresh the index and could collide with a git command of the user's.
    env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
    capture_output=True,
    text=True,
    check=True,
    timeout=_GIT_SECONDS,
  )
  return done.stdout.strip()


def command(words: Sequence[str]) -> str:
  """A process's command line (sys.orig_argv) in a form that can be typed again, without the folders of programs."""
  program, *rest = words
  if rest and pathlib.Path(rest[0]).name == "instructjax":  # the console script, which Python runs
    return shlex.join(["instructjax", *rest[1:]])
  return shlex.join(["python" if "python" in pathlib.Path(program).name else program, *rest])


def _num_cpus() -> int:
  if hasattr(os, "sched_getaffinity"):
    # On Linux these are the cores that this process may use, not all of the machine's.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu_model(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """The CPU's model name, or its architecture if the system does not report a name."""
  try:
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:  # only Linux has this file
    lines = []
  named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return next(iter(named), "") or platform.processor() or platform.machine()
