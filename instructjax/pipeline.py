"""Which stage needs which, and running what is missing. Called by main."""

import math
import pathlib

import jax
import rich
from jax.experimental import multihost_utils

from instructjax import (
  checkpoint,
  collect,
  evaluate,
  policies,
  ppo_stage,
  pretrain,
  rm,
  sft,
  sharding,
  supervised,
)
from instructjax.config import Config
from instructjax.context import Context, canonical
from instructjax.data import sources
from instructjax.data import tokenizer as tokenizers

RUN = {
  "pretrain": pretrain.run,
  "reward_pretrain": pretrain.run,
  "sft": sft.run,
  "ppo_init": sft.run,
  "collect": collect.run,
  "rm": rm.run,
  "sft_select": sft.select,
  "ppo": ppo_stage.run,
  "ppo_ptx": ppo_stage.run,
  "ppo_beta0": ppo_stage.run,
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
  return [stage for stage in stages if not ctx.given_weights(stage)]


def check(ctx: Context, stages: list[str]):
  """Looks ahead for what would stop the run hours later.

  Raises:
    ValueError: a source that a coming stage reads has no usable record or does not go with the
      others, a batch or a parameter does not divide over the mesh, or given weights do not fit.
  """
  policies.require_given_weights(ctx)
  supervised.param_shardings(ctx.mesh, ctx.model("policy"))
  if "rm" in stages:
    supervised.param_shardings(ctx.mesh, ctx.model("reward"))
  shards = math.prod(ctx.mesh.shape[axis] for axis in sharding.ROWS)
  # pretrain's batch also is that of the held-out text, which most stages measure.
  used = {"pretrain", *("ppo" if stage in policies.RL_STAGES else stage for stage in stages)}
  for name in used.intersection(_BATCHED):
    size = getattr(ctx.config, name).batch_size
    if size % shards:
      raise ValueError(
        f"config.{name}.batch_size={size} must be divisible by mesh data * fsdp = {shards}; set"
        f" --config.{name}.batch_size to a multiple"
      )
  if "collect" in stages and sources.simulation(ctx.config.data.prompts) is None:
    raise ValueError(
      f"config.data.comparisons='demo:' are collected on the demo's prompts, and config.data.prompts="
      f"{ctx.config.data.prompts!r}; give comparisons of your own, as jsonl:PATH"
    )
  coming = [stage for stage in stages if checkpoint.read_done(ctx.directory(stage)) is None]
  kinds = {kind for stage in coming for kind in _READS[stage]}
  for kind in sorted(kinds - ({"comparisons"} if ctx.collects else set())):
    for split in ("train", "validation"):
      ctx.prompt_tokens(split) if kind == "prompts" else ctx.records(kind, split)
  if "rm" in coming and not ctx.collects:
    rm.fold_labelers(ctx)


def make_context(config: Config, workdir: pathlib.Path) -> Context:
  """Mesh and tokenizer of a run."""
  mesh = sharding.make_mesh(config.mesh)
  return Context(config=config, workdir=workdir, mesh=mesh, tokenizer=_tokenizer(config, workdir))


def _tokenizer(config: Config, workdir: pathlib.Path) -> tokenizers.Tokenizer:
  """The one in the file given, or one trained on the documents, once a workdir.

  Raises:
    ValueError: it is not of the size, or was not trained on the documents, that the config names.
  """
  cfg, data, directory = config.tokenizer, config.data, workdir / "tokenizer"
  path = pathlib.Path(cfg.path or directory / "tokenizer.model")
  if not cfg.path:
    source = {"spec": data.documents, "validation_fraction": data.validation_fraction}
    blocks = {"config.tokenizer": cfg, "config.documents": source, "config.seed": config.seed}
    fingerprint = {name: canonical(value) for name, value in blocks.items()}
    done = checkpoint.read_done(directory)
    if done:
      checkpoint.require_same_run(directory, done["fingerprint"], fingerprint)
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
      tokenizers.train_tokenizer(texts, cfg.vocab_size, path, config.seed)
      checkpoint.write_done(directory, {"fingerprint": fingerprint})
    multihost_utils.sync_global_devices("tokenizer trained")
  tokenizer = tokenizers.Tokenizer(path)
  if tokenizer.vocab_size != cfg.vocab_size:
    raise ValueError(
      f"config.tokenizer.vocab_size={cfg.vocab_size} must be the {tokenizer.vocab_size} pieces of {path}"
    )
  return tokenizer


def run(config: Config, workdir: pathlib.Path):
  """Runs every stage of the plan that is not finished yet.

  Raises:
    ValueError: see `check`; or a finished stage was made with another config, tokenizer or parent.
    UserError: a stage was stopped, or files cannot be written.
  """
  ctx = make_context(config, workdir)
  stages = plan(ctx)
  check(ctx, stages)
  with jax.set_mesh(ctx.mesh):
    for number, stage in enumerate(stages, start=1):
      rich.print(rf"\[{number}/{len(stages)}] [bold]{stage}[/]")
      RUN[stage](ctx, stage)
  rich.print(f"finished: {workdir}")
