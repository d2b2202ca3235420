r"""Predicts whether a stage fits on a TPU slice and how long it may take, using the TPU's compiler but no TPU.

  python -m launch.plan --config=configs/ppo_ptx.py:gpt3_1p3b --topology=v5e:16x16

It compiles the stage's own train step for the slice and analyses the compiled text. It also says what a whole run may
take and cost, and which settings would save time or memory. With --search, it tries several meshes and recommends one.
It needs no weights, data or tokenizer, but libtpu: pip install -e '.[plan]'.

The exit code is 1 if nothing fits, and 2 after a mistake. All times are estimates, because nothing has run on a TPU.
"""

import dataclasses
import functools
import json
import sys
from typing import TYPE_CHECKING

from absl import flags

from instructjax.commands import cli, config_flag
from instructjax.core.config import Config, MeshConfig, from_config_dict
from instructjax.core.errors import UserError
from launch import estimate, search, topology

if TYPE_CHECKING:
  from launch import planning

_CONFIG = config_flag.define()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "CHIP:AxB or CHIP:AxBxC, as v5e:16x16; two such slices are 2xv5e:16x16."
)
_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "AXIS:SIZE,... as fsdp:32,tensor:8; axes left out are 1. By default the one that a run of the config would take.",
)
_STAGE = flags.DEFINE_string("stage", None, "Which stage's step. The config's by default.")
_SEARCH = flags.DEFINE_boolean(
  "search",
  False,
  "Try meshes, and settings that change results by rounding at most; recommend one.",
)
_TRIES = flags.DEFINE_integer("tries", 3, "With --search: how many meshes that fit to compile.")
_MEAN_RESPONSE = flags.DEFINE_float(
  "mean_response",
  None,
  "Tokens of an answer on average. By default all are as long as they may be: the bound.",
)
_MEAN_PROMPT = flags.DEFINE_float(
  "mean_prompt",
  None,
  "Tokens of a prompt on average; as --mean_response.",
)
_PRICE = flags.DEFINE_float(
  "price_per_chip_hour",
  None,
  "Price of a chip for an hour, in any currency; adds what a run costs.",
)
_DEMONSTRATIONS = flags.DEFINE_integer(
  "demonstrations", 12_725, "Demonstrations in your data, for the hours of a run; the paper's."
)
_COMPARISONS = flags.DEFINE_integer(
  "comparisons",
  33_207,
  "Prompts with comparisons in your data, for the hours of a run; the paper's.",
)
_COMPILE = flags.DEFINE_boolean(
  "compile",
  True,
  "Compile the program. --nocompile is done in seconds and knows sizes only: no more than a sketch.",
)
_TRY_CHANGES = flags.DEFINE_integer(
  "try_changes",
  None,
  "How many changes of settings to compile, the most promising first. By default 2 if the plan does not fit, else none:"
  " changes are then only sketched.",
)
_COMPILER_OPTIONS = flags.DEFINE_list(
  "compiler_options",
  [],
  "Options of the TPU's compiler to try: NAME=VALUE,..., as LIBTPU_INIT_ARGS has them in a run.",
)
_JSON = flags.DEFINE_boolean("json", False, "Print one line of JSON.")
flags.declare_key_flag("config")  # defined in another module, whose flags --help would leave out
flags.mark_flags_as_required(["config", "topology"])


def parse_mesh(spelling: str) -> MeshConfig:
  """Parses a mesh such as `fsdp:64,tensor:4`. Axes that are not named have size 1.

  Raises:
    UserError: the text has another form, or names an unknown axis or an axis twice.
  """
  sizes = dict.fromkeys((field.name for field in dataclasses.fields(MeshConfig)), 1)
  pairs = [part.partition(":") for part in spelling.split(",")]
  names = [name for name, _, _ in pairs]
  try:
    given = {name: int(size) for name, _, size in pairs}
  except ValueError:
    given = {}
  if not given or set(names) - set(sizes) or len(set(names)) < len(names):
    raise UserError(
      f"--mesh={spelling} must be AXIS:SIZE,... with each of {', '.join(sizes)} at most once, as"
      " fsdp:64,tensor:4"
    )
  return MeshConfig(**sizes | given)


def _search(config: Config, stage: str):
  """Runs --search, prints its report, and exits with 1 if nothing fits.

  Raises:
    UserError: flags contradict each other, or no mesh is possible.
  """
  if _MESH.value is not None:
    raise UserError(f"--search chooses the mesh: leave out --mesh={_MESH.value}")
  if not _COMPILE.value:
    raise UserError("--search compiles the best meshes: leave out --nocompile")
  for flag in (_MEAN_RESPONSE, _MEAN_PROMPT, _PRICE, _TRY_CHANGES):
    if flag.value is not None:
      raise UserError(f"--{flag.name}={flag.value:g} is for one mesh: leave it out with --search")
  chip, devices = topology.chip(_TOPOLOGY.value), topology.devices(_TOPOLOGY.value)
  compile_one = functools.partial(search.compile_apart, sys.argv[1:])
  report = search.run(config, stage, _TOPOLOGY.value, devices, chip, _TRIES.value, compile_one)
  print(json.dumps(report) if _JSON.value else search.text(report))
  if not report["recommended"]:
    sys.exit(1)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag or setting is wrong, or libtpu is not installed.
  """
  if arguments:
    raise UserError(f"unexpected arguments {arguments}; settings are given as --config.NAME=VALUE")
  values = _CONFIG.value
  if _MESH.value is not None:
    mesh = parse_mesh(_MESH.value)
    values.mesh.update(dataclasses.asdict(mesh))
  config = from_config_dict(values)
  stage = _STAGE.value or config.stage
  if not _JSON.value:
    print(*(f"{line}\n" for line in config_flag.explain(values)), sep="", end="")
  if _SEARCH.value:
    _search(config, stage)
    return
  from launch import planning  # NumPy, which --help needs not wait for

  assumed = _assumed()
  what = config, _TOPOLOGY.value, stage, assumed
  report = planning.plan(*what, _options()) if _COMPILE.value else planning.outline(*what)
  if _TRY_CHANGES.value != 0 or not _JSON.value:
    report = planning.what_to_change(config, report, assumed, _TRY_CHANGES.value, sys.argv[1:])
  if _JSON.value:
    print(json.dumps(report, default=vars))
  else:
    print(_in_words(report))
  if not report["fits"]:
    sys.exit(1)


def _options() -> dict[str, str]:
  """The compiler's options.

  Raises:
    UserError: one has another form than NAME=VALUE.
  """
  pairs = [option.removeprefix("--").partition("=") for option in _COMPILER_OPTIONS.value]
  for name, sign, value in pairs:
    if not (name and sign and value):
      raise UserError(f"--compiler_options={name}{sign}{value} must be NAME=VALUE,...")
  return {name: value for name, _, value in pairs}


def _in_words(report: dict) -> str:
  if "sketched_bytes" in report:
    return estimate.outline(report)
  return estimate.text(report) if report["fits"] else estimate.refusal(report)


def _assumed() -> "planning.Assumed":
  """What the flags say of what a plan cannot know.

  Raises:
    UserError: a number is not possible.
  """
  from launch import lengths, planning  # NumPy

  for flag in (_DEMONSTRATIONS, _COMPARISONS):
    if flag.value < 1:
      raise UserError(f"--{flag.name}={flag.value} must be positive")
  price = _PRICE.value
  if price is not None and not 0 <= price < float("inf"):
    raise UserError(f"--price_per_chip_hour={price:g} must be 0 or more")
  if _TRY_CHANGES.value is not None and _TRY_CHANGES.value < 0:
    raise UserError(f"--try_changes={_TRY_CHANGES.value} must be 0 or more")
  means = lengths.Means(_MEAN_PROMPT.value, _MEAN_RESPONSE.value)
  return planning.Assumed(_DEMONSTRATIONS.value, _COMPARISONS.value, means, price)


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
