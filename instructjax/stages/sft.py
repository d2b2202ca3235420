"""Supervised fine-tuning on demonstrations: the SFT baseline (C.1) and, with a pretraining mix, PPO's start (C.3)."""

import dataclasses
from typing import Any

import jax
import numpy as np

from instructjax.core import results
from instructjax.core.config import SFTConfig
from instructjax.core.stages import STAGES
from instructjax.core.structs import Params
from instructjax.data import batching
from instructjax.models import adapters, flops, transformer
from instructjax.parallel import sharding
from instructjax.stages import bases, lineage, policies
from instructjax.stages.context import Context, finish, is_finished, stage_run, tell_adapter
from instructjax.stages.text_rows import document_batches, validation_rows
from instructjax.train import loop, saved_state, supervised
from instructjax.train.optim import make_optimizer, require_steps


def _sft_config(ctx: Context, stage: str) -> SFTConfig:
  return getattr(ctx.config, STAGES[stage].block)


def _batches(ctx: Context, cfg: SFTConfig, stage: str):
  """(batches of {'demonstrations'} rows, and of 'pretrain' rows if the config mixes text in; steps in an epoch).

  An epoch is one pass over the demonstrations, however much text is mixed in.
  """
  mix_rows = round(cfg.pretrain_mix * cfg.batch_size)
  # A global batch has the demonstrations first and the text after them, so a place below `first_mixed` is one of a
  # demonstration. Each process draws only its own places of both; `_join_rows` keeps this order.
  first_mixed = cfg.batch_size - mix_rows
  places = ctx.own_rows(cfg.batch_size)
  seed = ctx.data_seed(stage)
  demonstrations = batching.packed_batches(
    ctx.data.demonstration_rows("train", cfg.length),
    batch_size=first_mixed,
    seed=seed,
    places=places[places < first_mixed],
  )
  if not mix_rows:
    return batching.ZippedBatches(
      {"demonstrations": demonstrations}
    ), demonstrations.steps_per_epoch
  mixed = places[places >= first_mixed] - first_mixed
  text = document_batches(
    ctx, "train", length=cfg.length, batch_size=mix_rows, seed=seed, places=mixed
  )
  zipped = batching.ZippedBatches({"demonstrations": demonstrations, "pretrain": text})
  return zipped, demonstrations.steps_per_epoch


def _join_rows(batch: dict) -> Any:
  """Puts the rows of demonstrations and of pretraining text into one batch."""
  return jax.tree.map(lambda *rows: np.concatenate(rows), *batch.values())


def _validation_loss(ctx: Context, cfg: SFTConfig, model: transformer.Model):
  """Makes the evaluation (state, step) -> losses on held-out demonstrations and on held-out pretraining text."""
  evaluate = supervised.make_lm_evaluation(model, ctx.mesh, cfg.microbatches)
  evaluate_text = supervised.make_lm_evaluation(model, ctx.mesh, ctx.config.pretrain.microbatches)
  batches = batching.packed_batches(
    ctx.data.demonstration_rows("validation", cfg.length),
    batch_size=cfg.batch_size,
    seed=0,
    places=ctx.own_rows(cfg.batch_size),
  )
  # Drawn once and kept, so that every evaluation sees the same rows.
  demonstrations = [next(batches) for _ in range(batches.steps_per_epoch)]
  text = validation_rows(ctx, cfg.length)
  return lambda state, step: {
    "loss": evaluate(state.params, demonstrations),
    "pretrain_loss": evaluate_text(state.params, text),
  }


def check(ctx: Context, stage: str):
  """Checks the stage's data and settings.

  Raises:
    UserError: no demonstration of a split is short enough, or the warmup is as long as the stage.
  """
  cfg = _sft_config(ctx, stage)
  _, steps_per_epoch = _batches(ctx, cfg, stage)
  ctx.data.demonstration_rows("validation", cfg.length)
  require_steps(cfg.optim, cfg.num_epochs * steps_per_epoch, f"config.{STAGES[stage].block}.optim")


def start(ctx: Context, stage: str) -> tuple[tuple[Params, ...], Params]:
  """What a stage starts from: (its frozen base, see `bases.base`; what it trains).

  Raises:
    UserError: the weights cannot be read.
  """
  if not lineage.is_adapted(ctx.config):
    return (), policies.load(ctx, "base")
  frozen = lineage.frozen_stage(ctx.config, stage)
  return bases.base(ctx, stage), bases.first(ctx, frozen, "policy", ctx.key(stage))


def run(ctx: Context, stage: str):
  """Trains `sft` or `ppo_init` from the base, and keeps one checkpoint per epoch.

  Later stages start from the epoch with the best validation loss (`sft`) or from the last one (`ppo_init`).

  Raises:
    StageStopped: a metric is not finite.
    UserError: the stage was made with other settings, or files cannot be read or written.
    Preempted: the run was told to stop.
  """
  cfg = _sft_config(ctx, stage)
  step_run = stage_run(ctx, stage)
  if is_finished(step_run):
    return
  model = ctx.model("policy")
  batches, steps_per_epoch = _batches(ctx, cfg, stage)
  num_steps = cfg.num_epochs * steps_per_epoch
  epoch_ends = tuple(steps_per_epoch * (i + 1) for i in range(cfg.num_epochs))
  optim = lineage.optim(ctx.config, cfg.optim)
  tx = make_optimizer(optim, num_steps)
  base, params = start(ctx, stage)
  state, shardings = supervised.create_state(ctx.mesh, model, tx, params, ctx.key(stage))
  tell_adapter(ctx, stage, "policy", optim)
  losses = _validation_loss(ctx, cfg, model)

  def evaluate(state, step: int) -> dict[str, float]:
    params = adapters.joined(model, base, state.params)
    return losses(dataclasses.replace(state, params=params), step)

  loop.fit(
    step_run,
    state,
    supervised.make_lm_train_step(
      model,
      tx,
      dropout_rate=cfg.dropout,
      state_shardings=shardings,
      microbatches=cfg.microbatches,
    ),
    batches,
    num_steps=num_steps,
    constants=base,
    place=lambda batch: sharding.place_batch(ctx.mesh, _join_rows(batch)),
    evaluate=evaluate,
    evaluate_steps=epoch_ends,
    keep_steps=epoch_ends,
    flops=lambda metrics: flops.training(model, metrics["tokens"], cfg.length),
    show=("loss", "grad_norm", "validation/loss", "validation/pretrain_loss"),
  )
  # From the checkpoints, which also know the epochs that ended before this run was resumed.
  history = {
    step: saved_state.read_meta(step_run.directory, step)["metrics"] for step in epoch_ends
  }
  epochs = tuple(
    results.Epoch(
      step=step,
      validation_loss=history[step]["validation/loss"],
      pretrain_loss=history[step]["validation/pretrain_loss"],
    )
    for step in epoch_ends
  )
  # PPO starts from the end of ppo_init's training (C.3). The SFT baseline is its best epoch; by loss for now, until the
  # reward model has scored the epochs (see sft_select.py).
  is_best = STAGES[stage].keeps == "best"
  kept = min(epochs, key=lambda epoch: epoch.validation_loss) if is_best else epochs[-1]
  result = results.Tuned(epochs)
  finish(ctx, stage, step_run, kept.step, result)
