r"""Predicts whether a stage fits on a TPU slice and how long it may take, using the TPU's compiler but no TPU.

  python -m launch.plan --config=configs/ppo_ptx.py:gpt3_1p3b --topology=v5e:16x16 --mesh=fsdp:32,tensor:8

It compiles the stage's own train step for the slice and analyses the compiled text. With --search instead of --mesh, it
tries several meshes and recommends one. It needs no weights, data or tokenizer, but libtpu: pip install -e '.[plan]'.

The exit code is 1 if nothing fits, and 2 after a mistake. All times are estimates, because nothing has run on a TPU.
"""

import dataclasses
import functools
import json
import math
import resource
import sys
import time

from absl import flags

from instructjax.commands import cli, config_flag
from instructjax.core.config import Config, MeshConfig, from_config_dict
from instructjax.core.errors import UserError, reason
from launch import costs, estimate, lengths, search, topology

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
  "mean_response", None, "Estimate the rollout at this many tokens an answer on average as well."
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


def plan(
  config: Config, topology_name: str, stage: str, mean_response: float | None = None
) -> dict:
  """Compiles a stage's step for a TPU slice and analyses the result.

  Args:
    config: its mesh must have as many devices as the topology.
    topology_name: a slice as --topology names it.
    stage: a stage that trains.
    mean_response: also estimate the rollout at this mean length of answers [tokens]; None does not.
  Returns:
    A report of JSON values. `fits` says whether the program fits in memory; if not, the costs are missing.
  Raises:
    UserError: libtpu is not installed; the mesh, batch, stage and topology do not fit together; or the mean length is
      not possible.
  """
  limit = config.data.max_response_length
  if mean_response is not None:
    lengths.require_mean(mean_response, limit, stage)
  chip = topology.chip(topology_name)
  devices = topology.devices(topology_name)
  import jax  # only now: `topology.devices` has set the environment that JAX reads when it is imported

  from instructjax.parallel import sharding
  from launch import programs

  programs.require_trained(stage)
  config, refused = _with_mesh(config, stage, devices)
  mesh = sharding.make_mesh(config.mesh, devices)
  program = programs.make(config, mesh, stage)
  sizes = lambda trees: {name: programs.shard_bytes(tree) for name, tree in trees.items()}
  owners, inside = sizes(program.owners), sizes(program.inside)
  report = {
    "note": "estimates: nothing has run on a TPU",
    "stage": stage,
    "preset": config.preset,
    "topology": topology_name,
    "chip": chip.name,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "a_run_refuses": refused,
  }
  start, start_cpu = time.perf_counter(), time.process_time()
  try:
    with jax.set_mesh(mesh):
      lowered = program.step.trace(*program.arguments).lower()
      compiled = lowered.compile(compiler_options=topology.compiler_options(topology_name))
  except jax.errors.JaxRuntimeError as error:
    # The compiler reports a program that is too large as an error. Its message has the only figures there are.
    found = estimate.out_of_memory(str(error))
    if found is None:
      raise
    return report | {
      "fits": False,
      "out_of_memory": found,
      "memory": {"arguments": owners, "inside": inside},
    }
  spent = {
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - start_cpu,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }
  analysis = compiled.memory_analysis()
  summary = costs.summarise(_text(compiled, chip), len(devices), mesh.shape["slice"])
  model_rate = program.model_flops and program.model_flops / (len(devices) * chip.flops)
  timing = estimate.timing(summary, chip, program.rows, program.tokens, model_rate)
  decode = _decode(summary, program.rows, inside)
  at_mean = None
  if mean_response is not None:
    shards = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    at_mean = lengths.at_mean(
      mean_response, limit, program.rows, shards, decode, timing["estimates"], chip
    )
  return report | {
    "fits": True,
    "memory": estimate.memory(
      owners,
      inside,
      allocated=_allocated(analysis),
      peak=analysis.peak_memory_in_bytes,
      program=analysis.generated_code_size_in_bytes,
      hbm=chip.hbm_bytes,
    ),
    "argument_bytes": analysis.argument_size_in_bytes,
    "timing": timing,
    "token_kind": program.token_kind,
    "decode": decode and {"layout": program.decode_layout} | decode,
    "at_mean_response": at_mean,
    "collectives": summary.by_kind,
    "largest_collectives": estimate.largest(summary, 5),
    "host_transfers": summary.host_transfers,
    "unknown_trips": summary.unknown_trips,
    "compilation": spent,
  }


def _with_mesh(config: Config, stage: str, devices: list) -> tuple[Config, str]:
  """The config with the sizes of its mesh, and why a whole run would refuse them; '' if it would not.

  An axis that the config leaves open is what a run of all its stages takes, or what `stage` does if none fits them.

  Raises:
    UserError: the mesh is not one of so many devices.
  """
  from instructjax.parallel import sharding  # JAX, after the environment is set
  from instructjax.stages import lineage, meshes

  stages = [name for name in lineage.plan(config) if name != stage]
  refused = ""
  for divided in ([*stages, stage], [stage]):
    sizes = meshes.settle(config, divided, functools.partial(sharding.make_mesh, devices=devices))
    try:
      meshes.require_fit(config, sharding.make_mesh(sizes, devices), [*stages, stage])
    except UserError as error:
      refused = str(error)
    else:
      refused = ""
      break
  return dataclasses.replace(config, mesh=sizes), refused


def _decode(summary: costs.Summary, rows: int, inside: dict[str, int]) -> dict | None:
  """The costs of the decode loops, which are the rollout's longest; None if there is no rollout.

  Args:
    summary: costs of the program.
    rows: rows decoded at once.
    inside: name -> bytes of the rollout's arrays.
  """
  loops = [loop for loop in summary.loops.values() if loop.phase == "rollout" and loop.trips]
  if not loops:
    return None
  # Long answers have several, of almost equal length: see `sampling._stops`.
  longest = max(loop.trips for loop in loops)
  loops = [loop for loop in loops if loop.trips > longest / 2]
  steps, total = sum(loop.trips for loop in loops), costs.Cost()
  for loop in loops:
    total += loop.cost
  return {
    "steps": steps,
    "rows": rows,
    "weight_bytes": inside["bf16 rollout copy"],
    "step": {name: amount / steps for name, amount in vars(total).items()},
  }


def _text(compiled, chip: topology.Chip) -> str:
  """The text of the compiled program.

  Raises:
    UserError: jaxlib cannot read the program, because libtpu is newer than jaxlib. The message still says how much
      memory the program takes.
  """
  import jax  # only after the environment is set, see `plan`

  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    gib = _allocated(compiled.memory_analysis()) / topology.GIB
    raise UserError(
      f"it fits, {gib:.2f} of {chip.hbm_bytes / topology.GIB:.2f} GiB a device, but jaxlib cannot read the"
      f" program that libtpu made ({reason(error)}); try another mesh, or other versions of jax and libtpu"
    ) from error


def _allocated(analysis) -> int:
  """The bytes of HBM that a program takes, from its `memory_analysis`."""
  # Donated arguments and the results that replace them share memory (alias_size), so they are counted once.
  given_and_made = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
  inside = analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
  return given_and_made - analysis.alias_size_in_bytes + inside


def _search(config: Config, stage: str):
  """Runs --search, prints its report, and exits with 1 if nothing fits.

  Raises:
    UserError: flags contradict each other, or no mesh is possible.
  """
  if _MESH.value is not None:
    raise UserError(f"--search chooses the mesh: leave out --mesh={_MESH.value}")
  if _MEAN_RESPONSE.value is not None:
    raise UserError("--mean_response is for one --mesh: leave it out with --search")
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
  report = plan(config, _TOPOLOGY.value, stage, _MEAN_RESPONSE.value)
  if _JSON.value:
    print(json.dumps(report))
  else:
    print(estimate.text(report) if report["fits"] else estimate.refusal(report))
  if not report["fits"]:
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
