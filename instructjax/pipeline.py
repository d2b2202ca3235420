"""Which stage needs which, and running what is missing. Called by main."""

import pathlib

import jax
import rich

from instructjax import collect, evaluate, policies, ppo_stage, pretrain, rm, sft, sharding
from instructjax.config import Config
from instructjax.context import Context
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


def plan(ctx: Context) -> list[str]:
  """Stages in the order they run, so that the one asked for has all it starts from."""
  target, evaluation = ctx.config.stage, ctx.config.evaluate
  if target == "pretrain":
    return ["pretrain"]
  if target in ("sft", "ppo_init"):
    return ["pretrain", target]
  stages = ["pretrain"]
  if policies.base_stage(ctx, "reward") != "pretrain":
    stages.append("reward_pretrain")
  stages += ["sft"] + (["collect"] if ctx.collects else []) + ["rm"]
  if target == "rm":
    return stages
  reinforcement = [name for name in ("ppo", "ppo_ptx") if name == target or name in evaluation.compare]
  if evaluation.overoptimization:
    reinforcement.append("ppo_beta0")
  return stages + ["sft_select", "ppo_init"] + reinforcement + ["evaluate"]


def make_context(config: Config, workdir: pathlib.Path) -> Context:
  """Mesh and tokenizer of a run; the tokenizer is trained on the documents unless a file is given."""
  mesh = sharding.make_mesh(config.mesh)
  path = pathlib.Path(config.tokenizer.path or workdir / "tokenizer" / "tokenizer.model")
  if not config.tokenizer.path and not path.exists():
    documents = sources.load(
        config.data.documents, "documents", "train", seed=config.seed,
        validation_fraction=config.data.validation_fraction, on_bad_record=config.data.on_bad_record,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizers.train_tokenizer([d.text for d in documents], config.tokenizer.vocab_size, path, config.seed)
  return Context(config=config, workdir=workdir, mesh=mesh, tokenizer=tokenizers.Tokenizer(path))


def run(config: Config, workdir: pathlib.Path):
  """Runs every stage of the plan that is not finished yet.

  Raises:
    ValueError: a finished stage was made with another config, tokenizer or parent.
  """
  ctx = make_context(config, workdir)
  stages = plan(ctx)
  with jax.set_mesh(ctx.mesh):
    for number, stage in enumerate(stages, start=1):
      rich.print(rf"\[{number}/{len(stages)}] [bold]{stage}[/]")
      RUN[stage](ctx, stage)
  rich.print(f"finished: {workdir}")
