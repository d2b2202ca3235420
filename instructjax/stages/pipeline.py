"""Which stage needs which, and running what is missing. Called by main."""

import dataclasses
import pathlib
import time

import jax
import rich
from jax.experimental import multihost_utils

from instructjax.core.config import Config, PretrainConfig
from instructjax.core.errors import UserError, writing
from instructjax.data import sources
from instructjax.data import tokenizer as tokenizers
from instructjax.parallel import distributed, memory, sharding
from instructjax.stages import (
  collect,
  evaluate,
  policies,
  ppo,
  pretrain,
  rm,
  sft,
)
from instructjax.stages.context import Context, canonical
from instructjax.train import finished, metrics, profiling
from instructjax.train.optim import make_optimizer

RUN = {
  "pretrain": pretrain.run,
  "reward_pretrain": pretrain.run,
  "sft": sft.run,
  "ppo_init": sft.run,
  "collect": collect.run,
  "rm": rm.run,
  "sft_select": sft.select,
  "ppo": ppo.run,
  "ppo_ptx": ppo.run,
  "ppo_beta0": ppo.run,
  "evaluate": evaluate.run,
}

# Records that a stage reads.
_READS = {
  "pretrain": ("documents",),
  "reward_pretrain": ("documents",),
  "sft": ("demonstrations", "documents"),
  "ppo_init": ("demonstrations", "documents"),
  "collect": ("prompts",),
  "rm": ("comparisons", "demonstrations"),
  "sft_select": ("prompts",),
  "ppo": ("prompts", "documents"),
  "ppo_ptx": ("prompts", "documents"),
  "ppo_beta0": ("prompts", "documents"),
  "evaluate": ("prompts", "documents"),
}
# Config blocks with a batch_size.
_BATCHED = ("pretrain", "reward_pretrain", "sft", "ppo_init", "rm", "ppo")


def plan(ctx: Context) -> list[str]:
  """Stages in the order they run, so that the one asked for has all it starts from.

  A base is not trained where the config gives its weights.
  """
  target = ctx.config.stage
  bases = list(dict.fromkeys(policies.base_stage(ctx, role) for role in ("policy", "reward")))
  needs_sft = target != "rm" or ctx.collects or ctx.config.rm.start_from == "sft"
  if not needs_sft:
    bases = [policies.base_stage(ctx, "reward")]
  stages = {
    "pretrain": ["pretrain"],
    "sft": ["pretrain", "sft"],
    "ppo_init": ["pretrain", "ppo_init"],
  }.get(target, bases + ["sft"] * needs_sft + ["collect"] * ctx.collects + ["rm"])
  if target in ("ppo", "ppo_ptx", "evaluate"):
    stages += ["sft_select", "ppo_init"] + policies.rl_stages(ctx) + ["evaluate"]
  return [stage for stage in stages if not ctx.weights_path(stage)]


def check(ctx: Context, stages: list[str]):
  """Looks ahead for what would stop the run hours later.

  Raises:
    UserError: a source that a coming stage reads has no usable record or does not go with the
      others, a batch or a parameter does not divide over the mesh, the few-shot prompt does not fit,
      or a warmup is as long as its stage.
  """
  # pretrain's batch also is that of the held-out text, which most stages measure.
  used = {"pretrain", *("ppo" if stage in policies.RL_STAGES else stage for stage in stages)}
  optional = {
    "ppo.packed_rows": ctx.config.ppo.packed_rows,
    "rollout.slots": ctx.config.rollout.slots,
  }
  batches = {
    f"config.{name}.batch_size": getattr(ctx.config, name).batch_size
    for name in _BATCHED
    if name in used
  }
  if "ppo" in used:
    batches |= {f"config.{name}": rows for name, rows in optional.items() if rows}
  ctx.require_fit(["policy", "reward"] if "rm" in stages else ["policy"], batches)
  if "collect" in stages and sources.simulation(ctx.config.data.prompts) is None:
    raise UserError(
      f"config.data.comparisons='demo:' are collected on the demo's prompts, and config.data.prompts="
      f"{ctx.config.data.prompts!r}; give comparisons of your own, as jsonl:PATH"
    )
  coming = _coming(ctx, stages)
  for kind in _kinds_read(ctx, coming):
    for split in ("train", "validation"):
      ctx.prompt_tokens(split) if kind == "prompts" else ctx.records(kind, split)
  if "rm" in coming and not ctx.collects:
    rm.fold_labelers(ctx)
  if "evaluate" in coming and "few_shot" in evaluate.judged_policies(ctx):
    evaluate.few_shot_prompts(ctx, evaluate.test_prompts(ctx))
  for stage in coming:
    _require_schedules(ctx, stage)


def _require_schedules(ctx: Context, stage: str):
  """Raises UserError where a learning rate's warmup is as long as the stage, if its steps are known by now."""
  try:
    if stage in policies.RL_STAGES:
      ppo.make_nets(ctx, ppo.variant(ctx, stage))
    elif stage in ("pretrain", "reward_pretrain"):
      cfg: PretrainConfig = getattr(ctx.config, stage)
      make_optimizer(cfg.optim, cfg.num_steps)
  except UserError as error:
    raise UserError(f"stage {stage}: {error}") from error


def _coming(ctx: Context, stages: list[str]) -> list[str]:
  return [stage for stage in stages if finished.read_done(ctx.directory(stage)) is None]


def _kinds_read(ctx: Context, stages: list[str]) -> list[str]:
  """Kinds of record that these stages read from a source that the config names."""
  kinds = {kind for stage in stages for kind in _READS[stage]}
  return sorted(kinds - ({"comparisons"} if ctx.collects else set()))


def _require_sources(ctx: Context):
  """Before anything is read or trained, all that is missing at once.

  Raises:
    UserError: the config names no source of records that a coming stage reads.
  """
  kinds = _kinds_read(ctx, _coming(ctx, plan(ctx)))
  missing = [kind for kind in kinds if not getattr(ctx.config.data, kind)]
  if missing:
    flags = " ".join(f"--config.data.{kind}=jsonl:PATH" for kind in missing)
    raise UserError(
      f"config.data must name a source of {', '.join(missing)} for stage {ctx.config.stage}; give"
      f" {flags} (or another source; only preset tiny brings its own)"
    )


def make_context(config: Config, workdir: pathlib.Path) -> Context:
  """Mesh and tokenizer of a run.

  Raises:
    UserError: a source of records is not given, given weights do not fit, or see `make_mesh` and
      `_tokenizer`.
  """
  mesh = sharding.make_mesh(config.mesh)
  ctx = Context(config=config, workdir=workdir, mesh=mesh, tokenizer=None)  # a plan needs none
  _require_sources(ctx)  # before a tokenizer is trained on documents
  return dataclasses.replace(ctx, tokenizer=_tokenizer(ctx))


def _tokenizer(ctx: Context) -> tokenizers.Tokenizer:
  """The one named, that of the given weights, or one trained on the documents; kept in the workdir.

  Raises:
    UserError: it is not of the size, or not the one, that the config or the workdir names.
  """
  cfg, directory = ctx.config.tokenizer, ctx.workdir / "tokenizer"
  given = ctx.given_weights("pretrain") or ctx.given_weights("reward_pretrain")
  source = cfg.path or (given.tokenizer_path if given else "")
  tokenizer = tokenizers.load(source) if source else _train(ctx.config, directory)
  policies.require_given_weights(dataclasses.replace(ctx, tokenizer=tokenizer))
  if tokenizer.vocab_size != cfg.vocab_size:
    raise UserError(
      f"config.tokenizer.vocab_size={cfg.vocab_size} must be the {tokenizer.vocab_size} pieces of"
      f" {tokenizer.path}"
    )
  # Last: a workdir belongs to the tokenizer it holds, and one from a mistaken flag must not stay.
  return _keep(tokenizer, directory) if source else tokenizer


def _keep(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> tokenizers.Tokenizer:
  """Copies a tokenizer from elsewhere into the workdir, so that the run's folder is whole."""
  if finished.read_done(directory):
    if tokenizers.load(directory).fingerprint != tokenizer.fingerprint:
      raise UserError(
        f"cannot go on with {directory.parent}: it was made with another tokenizer than"
        f" {tokenizer.path}. Use another --workdir, or the tokenizer in {directory}."
      )
  elif jax.process_index() == 0:
    with writing(directory):
      tokenizer.save(directory)
    finished.write_done(directory, {"fingerprint": {"tokenizer": tokenizer.fingerprint}})
  multihost_utils.sync_global_devices("tokenizer kept")
  return tokenizer


def _train(config: Config, directory: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer trained on the documents, once a workdir."""
  cfg, data = config.tokenizer, config.data
  source = {"spec": data.documents, "validation_fraction": data.validation_fraction}
  blocks = {"config.tokenizer": cfg, "config.documents": source, "config.seed": config.seed}
  fingerprint = {name: canonical(value) for name, value in blocks.items()}
  done = finished.read_done(directory)
  if done:
    finished.require_same_run(directory, done["fingerprint"], fingerprint)
  elif jax.process_index() == 0:
    documents = sources.load(
      data.documents,
      "documents",
      "train",
      seed=config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    texts = [document.text for document in documents]
    tokenizers.train_tokenizer(texts, cfg.vocab_size, directory / "tokenizer.model", config.seed)
    finished.write_done(directory, {"fingerprint": fingerprint})
  multihost_utils.sync_global_devices("tokenizer trained")
  return tokenizers.load(directory)


def run(config: Config, workdir: pathlib.Path):
  """Runs every stage of the plan that is not finished yet.

  Raises:
    UserError: see `check`; or a finished stage was made with another config, tokenizer or parent.
    UserError: a stage was stopped, or files cannot be written.
    Preempted: the run was told to stop.
  """
  ctx = make_context(config, workdir)
  stages = plan(ctx)
  check(ctx, stages)
  ran = []
  tell = rich.print if jax.process_index() == 0 else lambda line: None
  with jax.set_mesh(ctx.mesh):
    for number, stage in enumerate(stages, start=1):
      distributed.require_going_on()
      tell(rf"\[{number}/{len(stages)}] [bold]{stage}[/]")
      is_finished = finished.read_done(ctx.directory(stage)) is not None
      start = time.monotonic()
      RUN[stage](ctx, stage)
      if not is_finished:
        ran.append((stage, time.monotonic() - start, ctx.directory(stage)))
        memory.release_freed_memory()
      multihost_utils.sync_global_devices(f"{stage} finished")  # one process writes, all go on
  if ran and jax.process_index() == 0:
    _print_times(config, ran)
  tell(f"finished: {workdir}")


def _print_times(config: Config, ran: list[tuple[str, float, pathlib.Path]]):
  """What the stages that ran took, and where the time of their traced steps went."""
  rich.print(profiling.stage_table(ran))
  for stage, _, directory in ran if config.profile.steps else ():
    table = profiling.profile_table(stage, directory / "profile")
    if table:
      rich.print(table)
    elif metrics.read_metrics(directory):
      rich.print(
        f"{stage}: it took none of the steps {config.profile.steps}, so that none was traced"
      )
