"""Plans a stage's step for a TPU slice: compiles it, or sketches it from its sizes, and reports what that says.

Called by plan.py, which is the command. JAX is imported inside functions only, after the environment is set.
"""

import dataclasses
import functools
import importlib.metadata
import re
import resource
import time
from collections.abc import Mapping

from instructjax.core.config import Config, MeshConfig
from instructjax.core.errors import UserError, reason
from instructjax.core.stages import RL_STAGES
from launch import costs, estimate, expect, lengths, progress, search, topology


@dataclasses.dataclass(frozen=True)
class Assumed:
  """What a plan cannot know.

  Attributes:
    demonstrations, comparisons: records in the user's data.
    means: lengths of prompts and answers.
    price: of a chip for an hour; None leaves costs out.
  """

  demonstrations: int
  comparisons: int
  means: lengths.Means = lengths.BOUND
  price: float | None = None


def plan(
  config: Config,
  topology_name: str,
  stage: str,
  assumed: Assumed,
  options: Mapping[str, str] | None = None,
) -> dict:
  """Compiles a stage's step for a TPU slice and analyses the result.

  Args:
    config: its mesh must be possible for the devices of the topology.
    topology_name: a slice as --topology names it.
    stage: a stage that trains.
    assumed: what a plan cannot know.
    options: options of the compiler, name -> value.
  Returns:
    A report of JSON values. `fits` says whether the program fits in memory; if not, the costs are missing.
  Raises:
    UserError: libtpu is not installed; the mesh, batch, stage and topology do not fit together; a mean length is not
      possible; or the compiler has no such option.
  """
  chip = topology.chip(topology_name)
  config, program, mesh, report = _prepare(config, topology_name, stage, assumed.means)
  from instructjax.parallel import sharding  # JAX, after `topology.devices` has set the environment
  from launch import sketch, whole_run

  means, memory = assumed.means, report["memory"]
  owners, inside = memory["arguments"], memory["inside"]
  start, start_cpu = time.perf_counter(), time.process_time()
  what = f"compiling {stage} {config.preset} for {topology_name}, {estimate.spell_mesh(mesh.shape)}"
  with progress.telling(what):
    compiled, found = _compile(program, mesh, topology_name, options or {})
  if found is not None:
    return report | {"fits": False, "out_of_memory": found}
  spent = {
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - start_cpu,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }
  analysis = compiled.memory_analysis()
  work = sketch.work_of(config, stage, sharding.num_row_shards(mesh), means)
  turns = work.turns if work is not None else lambda op_name: None
  summary = costs.summarise(_text(compiled, chip), mesh.size, mesh.shape["slice"], turns)
  model_rate = program.model_flops and program.model_flops / (mesh.size * chip.flops)
  tokens = round(program.tokens * _share_sampled(config, stage, means))
  timing = estimate.timing(summary, chip, program.rows, tokens, model_rate)
  decoding = whole_run.total_decoding(summary)
  expected = whole_run.compiled(config, stage, mesh, chip, means, decoding, timing)
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
    "tokens": tokens,
    "token_kind": program.token_kind,
    "decode": _decode(decoding, program.decode_layout),
    "expected": expect.as_dict(expected),
    "run": _run(config, stage, expected, "compiled", mesh, chip, assumed),
    "collectives": summary.by_kind,
    "largest_collectives": estimate.largest(summary, 5),
    "host_transfers": summary.host_transfers,
    "unknown_trips": summary.unknown_trips,
    "compilation": spent,
  }


def outline(config: Config, topology_name: str, stage: str, assumed: Assumed) -> dict:
  """What sizes alone say of a stage's step: a report as from `plan`, without what only the compiler knows.

  Args, raises: as for `plan`.
  """
  chip = topology.chip(topology_name)
  config, program, mesh, report = _prepare(config, topology_name, stage, assumed.means)
  from launch import whole_run  # JAX, after the environment is set

  expected, sizes = whole_run.sketched(config, stage, mesh, chip, assumed.means, program)
  return report | {
    "fits": sizes.bytes <= chip.hbm_bytes,
    "hbm": int(chip.hbm_bytes),
    "sketched_bytes": sizes.bytes,
    "tokens": round(program.tokens * _share_sampled(config, stage, assumed.means)),
    "token_kind": program.token_kind,
    "expected": expect.as_dict(expected),
    "run": _run(config, stage, expected, "sketched", mesh, chip, assumed),
  }


def _prepare(config: Config, topology_name: str, stage: str, means: lengths.Means):
  """The config with the sizes of its mesh, the program, the mesh, and what a report begins with.

  Raises:
    UserError: see `plan`.
  """
  lengths.require_mean("response", means.response, config.data.max_response_length)
  lengths.require_mean("prompt", means.prompt, config.data.max_prompt_length)
  chip, devices = topology.chip(topology_name), topology.devices(topology_name)
  from instructjax.parallel import sharding  # JAX, after the environment is set
  from launch import programs

  programs.require_trained(stage, config)
  config, refused = _with_mesh(config, stage, devices)
  mesh = sharding.make_mesh(config.mesh, devices)
  try:
    program = programs.make(config, mesh, stage, means)
  except UserError as error:
    raise UserError(with_mesh_flag(str(error))) from error
  sizes = lambda trees: {name: programs.shard_bytes(tree) for name, tree in trees.items()}
  report = {
    "note": "estimates: nothing has run on a TPU",
    "compiler": versions(),
    "stage": stage,
    "preset": config.preset,
    "topology": topology_name,
    "chip": chip.name,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "means": dataclasses.asdict(means),
    "a_run_refuses": refused,
    "memory": {"arguments": sizes(program.owners), "inside": sizes(program.inside)},
  }
  return config, program, mesh, report


def _run(
  config: Config,
  stage: str,
  expected: expect.Expectation,
  source: str,
  mesh,
  chip: topology.Chip,
  assumed: Assumed,
) -> dict:
  """The times and the cost of a run of all stages."""
  from launch import whole_run  # JAX, after the environment is set

  records = whole_run.Records(assumed.demonstrations, assumed.comparisons)
  known = stage, expected, source
  times, left_out = whole_run.stages(config, known, mesh, chip, assumed.means, records)
  cost = expect.cost(times, mesh.size // chip.devices, assumed.price)
  return cost | {"left_out": left_out, "for": whole_run.words(records)}


def versions() -> dict[str, str]:
  """The versions of the compiler and of what calls it."""
  return {name: importlib.metadata.version(name) for name in ("libtpu", "jax")}


def _share_sampled(config: Config, stage: str, means: lengths.Means) -> float:
  """The share of the longest answers' tokens that answers of the mean length have; 1 where none are sampled."""
  if stage not in RL_STAGES or means.response is None:
    return 1.0
  return means.response / config.data.max_response_length


def _compile(program, mesh, topology_name: str, more: Mapping[str, str]):
  """Compiles a program: (compiled program, None), or (None, the compiler's figures) where it does not fit."""
  import jax  # only after the environment is set, see `plan`

  try:
    with jax.set_mesh(mesh):
      lowered = program.step.trace(*program.arguments).lower()
      options = topology.compiler_options(topology_name) | dict(more)
      return lowered.compile(compiler_options=options), None
  except jax.errors.JaxRuntimeError as error:
    # The compiler reports a program that is too large as an error. Its message has the only figures there are.
    found = estimate.out_of_memory(str(error))
    if found is None and more and "INVALID_ARGUMENT" in str(error):
      raise UserError(f"--compiler_options: {reason(error)}") from error
    if found is None:
      raise
    return None, found


def what_to_change(
  config: Config, report: dict, assumed: Assumed, number: int | None, command: list[str]
) -> dict:
  """Adds to a report which changes of settings would help: `changes` and their text.

  Args:
    config: as for `plan`.
    report: from `plan`.
    assumed: as for `plan`.
    number: how many changes to compile; None is 2 if the plan does not fit, else none.
    command: the flags that this process was started with.
  """
  from instructjax.parallel import sharding  # JAX, after the environment is set
  from launch import changes, whole_run

  stage, means, fits = report["stage"], assumed.means, report["fits"]
  chip, devices = topology.chip(report["topology"]), topology.devices(report["topology"])
  config = dataclasses.replace(config, mesh=MeshConfig(**report["mesh"]))
  if "sketched_bytes" in report:
    seconds, size = report["expected"]["seconds"], report["sketched_bytes"]
  elif fits:
    seconds, size = report["expected"]["seconds"], report["memory"]["allocated"]
  else:
    mesh = sharding.make_mesh(config.mesh, devices)
    seconds = whole_run.sketched(config, stage, mesh, chip, means)[0].seconds
    size = report["out_of_memory"]["needed"] * topology.GIB
  found = changes.sketch_all(config, stage, devices, chip, means, (seconds, size))
  found = changes.promising(found, seconds, fits)
  if number is None:
    number = 0 if fits or "sketched_bytes" in report else 2
  compile_one = lambda flags: search.compile_apart(command, flags)
  found = changes.compile_best(found, number, fits, compile_one)
  lines = changes.text(found, seconds, size, fits)
  rows = [dataclasses.asdict(one) | {"flags": one.flags} for one in found]
  return report | {"changes": rows, "changes_text": lines}


def with_mesh_flag(message: str) -> str:
  """A message in which a mesh is spelled as --mesh, which takes precedence over the flags that a run has for it."""

  def spelled(match: re.Match) -> str:
    sizes = re.findall(r"--config\.mesh\.(\w+)=(\d+)", match[0])
    return f"--mesh={estimate.spell_mesh({axis: int(size) for axis, size in sizes})}"

  return re.sub(r"--config\.mesh\.\w+=\d+( --config\.mesh\.\w+=\d+)*", spelled, message)


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
      refused = with_mesh_flag(str(error))
    else:
      refused = ""
      break
  return dataclasses.replace(config, mesh=sizes), refused


def _decode(decoding: costs.Loop | None, layout: str | None) -> dict | None:
  """The costs of decoding; None if there is no rollout."""
  if decoding is None or not decoding.trips:
    return None
  step = {name: amount / decoding.trips for name, amount in vars(decoding.cost).items()}
  return {"layout": layout, "steps": decoding.trips, "step": step}


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
