"""Pretraining on documents: the base model that stands in for GPT-3 when no weights are given."""

import itertools

from instructjax.core.config import ModelConfig, PretrainConfig
from instructjax.data import batching
from instructjax.models import flops
from instructjax.parallel import sharding
from instructjax.stages.context import Context, is_finished, stage_run
from instructjax.train import checkpoint, finished, loop, supervised
from instructjax.train.optim import make_optimizer


def document_batches(
  ctx: Context, split: str, *, length: int, batch_size: int, seed: int, places=None
):
  """Packed rows of pretraining text; `places` in a global batch, where they are not its only rows."""
  return batching.lm_batches(
    ctx.document_tokens(split),
    length=length,
    batch_size=batch_size,
    seed=seed,
    vocab_size=ctx.tokenizer.vocab_size,
    eos_id=ctx.tokenizer.eos_id,
    places=ctx.own_rows(batch_size) if places is None else places,
  )


def validation_rows(ctx: Context, length: int) -> list:
  """The same held-out rows of pretraining text for every stage that reports a pretraining loss."""
  batch_size = ctx.config.pretrain.batch_size
  batches = document_batches(ctx, "validation", length=length, batch_size=batch_size, seed=0)
  return list(
    itertools.islice(batches, min(ctx.config.evaluate.pretrain_batches, batches.steps_per_epoch))
  )


def run(ctx: Context, stage: str):
  """Trains `pretrain` (the policy's base) or `reward_pretrain` (the reward model's).

  The base is the step with the lowest held-out loss: little text, read often, is learnt by heart.
  """
  cfg: PretrainConfig = ctx.config.pretrain if stage == "pretrain" else ctx.config.reward_pretrain
  model_cfg: ModelConfig = ctx.config.model if stage == "pretrain" else ctx.config.reward_model
  step_run = stage_run(
    ctx, stage, {"model": model_cfg, "stage": cfg, "documents": ctx.config.data.documents}
  )
  if is_finished(step_run):
    return
  model = ctx.model("policy" if stage == "pretrain" else "reward_base")
  tx = make_optimizer(cfg.optim, cfg.num_steps)
  key = ctx.key(stage)
  params = supervised.init_params(ctx.mesh, model, key)
  state, shardings = supervised.create_state(ctx.mesh, model, tx, params, key)
  evaluate = supervised.make_lm_evaluation(model, ctx.mesh)
  held_out = validation_rows(ctx, cfg.length)
  loop.fit(
    step_run,
    state,
    supervised.make_lm_train_step(model, tx, dropout_rate=0.0, state_shardings=shardings),
    document_batches(
      ctx, "train", length=cfg.length, batch_size=cfg.batch_size, seed=ctx.data_seed(stage)
    ),
    num_steps=cfg.num_steps,
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    evaluate=lambda state, step: {"loss": evaluate(state.params, held_out)},
    evaluate_steps={*range(cfg.evaluate_every, cfg.num_steps, cfg.evaluate_every), cfg.num_steps},
    best_metric="validation/loss",
    flops=lambda metrics: 3 * flops.forward(model, metrics["tokens"], cfg.length),
    show=("loss", "grad_norm", "validation/loss"),
  )
  step, loss = checkpoint.best_step(step_run.directory, "validation/loss")
  finished.write_done(
    step_run.directory,
    {"fingerprint": step_run.fingerprint, "step": step, "validation_loss": loss},
  )
