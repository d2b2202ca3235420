"""Whether all processes of a run are the same run: the same config, code, libraries, environment, tokenizer and data.

Processes that differ would not fail. They would train one network on two configs, and finish. So each process writes
its facts into the coordination service's store, process 0 compares them, and all end with the same line if they differ.
The facts are a few kilobytes a process, and no device takes part. Called by main and pipeline.py; never imports JAX
itself.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import instructjax
from instructjax.core import provenance
from instructjax.core.errors import UserError
from instructjax.parallel.lobby import Waiting, numbers
from instructjax.parallel.watchdog import Team

# Variables that change what is computed, besides the settings of JAX.
_VARIABLES = (
  *("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC", "XLA_FLAGS"),
  *("TF_ENABLE_ONEDNN_OPTS", "CUBLAS_WORKSPACE_CONFIG"),
)
# Settings of JAX that change what is computed, whether a variable or a config file has set them.
_JAX_SETTINGS = (
  *(
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
  ),
  *("jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_allow_f16_reductions"),
  *("jax_softmax_custom_jvp", "jax_high_dynamic_range_gumbel", "jax_disable_jit"),
  *("jax_disable_most_optimizations", "jax_use_shardy_partitioner", "jax_explicit_x64_dtypes"),
)
_HASH_LETTERS = 12  # of a hash in a message
_LONGEST = 80  # letters of a value in a message
_SHARED_SECONDS = 20.0  # that a new file in the workdir may take to be seen by another host
_MARKER = ".together"


def settings(config: Any, where: str = "config") -> dict[str, str]:
  """Facts about a config: dotted name -> value as text, without the fields that name places on a host's own disk."""
  result = {}
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), f"{where}.{field.name}"
    if dataclasses.is_dataclass(value):
      result |= settings(value, name)
    elif "path" not in field.metadata:
      result[name] = repr(value)
  return result


def with_first_places(team: Team | None, config: Any) -> Any:
  """The config with process 0's places in place of this host's own. All processes must call it.

  What a run leaves names the places of its data, and what goes on with it compares them. So all processes use the same
  names there, and each reads from its own.
  """
  if team is None:
    return config
  if team.process == 0:
    team.put("places", json.dumps(_places(config)))
    return config
  return _replace_places(config, json.loads(_from_first(team, "places", "its settings")))


def _places(config: Any) -> dict[str, Any]:
  """The fields that name places, as a nested dict."""
  result = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      result[field.name] = _places(value)
    elif "path" in field.metadata:
      result[field.name] = value
  return result


def _replace_places(config: Any, places: Mapping[str, Any]) -> Any:
  changed = {
    name: _replace_places(getattr(config, name), value) if isinstance(value, dict) else value
    for name, value in places.items()
  }
  return dataclasses.replace(config, **changed)


def code() -> dict[str, str]:
  """Facts about the code: the package's version and a checksum of each of its files."""
  root = pathlib.Path(instructjax.__file__).parent
  result = {"version of instructjax": instructjax.__version__}
  for path in sorted(root.rglob("*.py")):
    name = path.relative_to(root.parent).as_posix()
    result[f"code {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:_HASH_LETTERS]
  return result


def libraries() -> dict[str, str]:
  """Facts about the libraries: name -> version, of those that are installed."""
  return {f"version of {name}": version for name, version in provenance.libraries().items()}


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
  """Facts about variables and settings that change what is computed."""
  result = {f"variable {name}": environ[name] for name in _VARIABLES if name in environ}
  jax = sys.modules.get("jax")
  known = jax.config.values if jax else {}
  return result | {name: repr(known[name]) for name in _JAX_SETTINGS if name in known}


def require_same(team: Team | None, name: str, facts: Mapping[str, str]):
  """Compares the facts of all processes. All must call it, in the same order.

  Args:
    team: the processes; None for a run of one, which agrees with itself.
    name: what is compared, in words.
    facts: name -> value as text.
  Raises:
    UserError: in all processes: they differ. It names a process, what differs, and both values.
  """
  if team is None:
    return
  if verdict := decide(team, name, dict(facts), difference):
    raise UserError(verdict)


def decide(team: Team, name: str, ours: Any, of_all: Callable[[dict[int, Any]], Any]) -> Any:
  """What process 0 makes of what all processes say. All must call it, in the same order.

  Args:
    team: the processes.
    name: what it is about, in words; used once in a run.
    ours: what this process says, for JSON.
    of_all: process -> what it says, to what all are to hear; called by process 0 only.
  """
  folder = f"facts/{name}"
  team.put(folder, json.dumps(ours))
  if team.process == 0:
    verdict = of_all(_all(team, folder, name))
    team.put(f"verdict/{name}", json.dumps(verdict))
  else:
    verdict = json.loads(_from_first(team, f"verdict/{name}", name))
  return verdict


def _all(team: Team, folder: str, name: str) -> dict[int, Any]:
  """Waits until each process has said something in a folder."""
  waiting = Waiting(time.monotonic())
  while len(said := team.said(folder)) < team.num_processes:
    waiting.say(_waits(team, set(range(team.num_processes)) - said.keys(), name))
    time.sleep(0.05)
  return {number: json.loads(text) for number, text in said.items()}


def _from_first(team: Team, folder: str, name: str) -> str:
  """Waits for what process 0 says in a folder."""
  waiting = Waiting(time.monotonic())
  while 0 not in (said := team.said(folder)):
    waiting.say(_waits(team, {0}, name))
    time.sleep(0.05)
  return said[0]


def follow_first(team: Team, folder: str, number: int, said: str) -> str:
  """What process 0 says under a number, in all processes. All must call it, with numbers that grow.

  Process 0 may say the next only when all have heard the last, since it overwrites it: where each waits for the others'
  devices in between, as in a step, that holds.

  Args:
    team: the processes.
    folder: where it is said.
    number: of what is said.
    said: what process 0 says; unused on the others.
  """
  if team.process == 0:
    team.put(folder, json.dumps([number, said]))
    return said
  waiting, pause = Waiting(time.monotonic()), 0.002
  while True:
    first = team.said(folder).get(0)
    found = json.loads(first) if first else [None, ""]
    if found[0] == number:
      return found[1]
    waiting.say(_waits(team, {0}, folder))
    time.sleep(pause)
    pause = min(0.05, 1.5 * pause)


def _waits(team: Team, missing: set[int], name: str) -> str:
  return f"process {team.process} waits for {numbers(missing)} of {team.num_processes}: {name}"


def difference(facts: Mapping[int, Mapping[str, str]]) -> str:
  """A line that names what differs between processes, or '' if nothing does.

  Args:
    facts: process -> its facts. What follows a tab in a value is shown, but not compared: the path of a file.
  """
  names = list(dict.fromkeys(name for own in facts.values() for name in own))
  whole = {name: {i: own.get(name, "none") for i, own in facts.items()} for name in names}
  values = {name: {i: v.partition("\t")[0] for i, v in whole[name].items()} for name in names}
  differing = [name for name in names if len(set(values[name].values())) > 1]
  if not differing:
    return ""
  name = differing[0]
  # What most processes have is taken for right, and of two process 0 has it.
  by_number = [values[name][i] for i in sorted(facts)]
  usual = max(dict.fromkeys(by_number), key=by_number.count)
  others = [i for i in sorted(facts) if values[name][i] != usual]
  model = next(i for i in sorted(facts) if values[name][i] == usual)
  more = f"; {len(differing) - 1} more differ, as {differing[1]}" if differing[1:] else ""
  return (
    f"the processes of this run are not the same: {name} is {_short(whole[name][others[0]])} on"
    f" {numbers(others)} and {_short(whole[name][model])} on process {model}{more}. Start all with the same command,"
    " code, libraries and data"
  )


def _short(value: str) -> str:
  """A value as a message shows it: the beginning of a checksum, and the end of its file's path."""
  value, _, path = value.partition("\t")
  value = re.sub("[0-9a-f]{32,}", lambda found: found[0][:_HASH_LETTERS], value)
  value = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
  path = path if len(path) <= _LONGEST else f"...{path[-_LONGEST:]}"
  return "".join(c if c.isprintable() else "?" for c in (f"{value} ({path})" if path else value))


def require_one_workdir(team: Team | None, workdir: pathlib.Path):
  """Checks that all processes see the same folder as workdir, under whatever path. All must call it.

  Raises:
    UserError: in all processes: some see another folder, or process 0 cannot write there.
  """
  if team is None:
    return
  marker, word = workdir / _MARKER, secrets.token_hex(8)
  if team.process == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      marker.write_text(word)
    except OSError as error:
      word = f"{workdir} cannot be written: {error.strerror}"
    team.put("marker", word)
  else:
    word = _from_first(team, "marker", "the workdir's owner")
  is_same = " " in word or _sees(marker, word)
  seen = f"{'a folder of process 0' if is_same else 'another folder'}\t{workdir}"
  try:
    require_same(team, "workdirs", {"the workdir, which all must share,": seen})
  finally:
    if team.process == 0:
      with contextlib.suppress(OSError):  # what could not be written cannot be removed either
        marker.unlink()
  if " " in word:
    raise UserError(word)


def _sees(marker: pathlib.Path, word: str) -> bool:
  deadline = time.monotonic() + _SHARED_SECONDS
  while True:
    try:
      if marker.read_text() == word:
        return True
    except (OSError, ValueError):
      pass
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
