"""Supervised fine-tuning: the SFT baseline (C.1) and, with a pretraining mix, PPO's initialisation (C.3)."""

import jax
import numpy as np

from instructjax.core.config import SFTConfig
from instructjax.data import batching
from instructjax.data.tokenize import tokenize_demonstrations
from instructjax.models import flops
from instructjax.parallel import sharding
from instructjax.stages import answers, policies
from instructjax.stages.context import Context, is_finished, stage_run
from instructjax.stages.pretrain import document_batches, validation_rows
from instructjax.train import finished, loop, metrics, supervised
from instructjax.train.optim import make_optimizer


def _demonstrations(ctx: Context, split: str) -> list:
  data = ctx.config.data
  return tokenize_demonstrations(
    ctx.records("demonstrations", split),
    ctx.tokenizer,
    max_prompt_length=data.max_prompt_length,
    max_response_length=data.max_response_length,
  )[0]


def _batches(ctx: Context, cfg: SFTConfig, stage: str):
  """Batches of demonstrations; with a pretraining mix, of {'demonstrations', 'pretrain'} rows."""
  mix_rows = round(cfg.pretrain_mix * cfg.batch_size)
  first_mixed = cfg.batch_size - mix_rows  # demonstrations, then text: see _join_rows
  places = ctx.own_rows(cfg.batch_size)
  common = dict(length=cfg.length, seed=ctx.data_seed(stage))
  demonstrations = batching.sft_batches(
    _demonstrations(ctx, "train"),
    batch_size=first_mixed,
    vocab_size=ctx.tokenizer.vocab_size,
    eos_id=ctx.tokenizer.eos_id,
    places=places[places < first_mixed],
    **common,
  )
  if not mix_rows:
    return batching.zip_batches({"demonstrations": demonstrations}), demonstrations.steps_per_epoch
  mixed = places[places >= first_mixed] - first_mixed
  text = document_batches(ctx, "train", batch_size=mix_rows, places=mixed, **common)
  zipped = batching.zip_batches({"demonstrations": demonstrations, "pretrain": text})
  return zipped, demonstrations.steps_per_epoch


def _join_rows(batch: dict):
  """One batch of rows from the demonstrations' and the pretraining text's."""
  return jax.tree.map(lambda *rows: np.concatenate(rows), *batch.values())


def _validation_loss(ctx: Context, cfg: SFTConfig, evaluate):
  batches = batching.sft_batches(
    _demonstrations(ctx, "validation"),
    length=cfg.length,
    batch_size=cfg.batch_size,
    seed=0,
    vocab_size=ctx.tokenizer.vocab_size,
    eos_id=ctx.tokenizer.eos_id,
    places=ctx.own_rows(cfg.batch_size),
  )
  demonstrations = [next(batches) for _ in range(batches.steps_per_epoch)]
  text = validation_rows(ctx, cfg.length)
  return lambda state, step: {
    "loss": evaluate(state.params, demonstrations),
    "pretrain_loss": evaluate(state.params, text),
  }


def run(ctx: Context, stage: str):
  """Trains `sft` or `ppo_init` from the base; keeps one checkpoint an epoch and marks the best by validation loss."""
  cfg: SFTConfig = getattr(ctx.config, stage)
  step_run = stage_run(
    ctx,
    stage,
    {"model": ctx.config.model, "stage": cfg, "data": ctx.config.data},
    parents=("pretrain",),
  )
  if is_finished(step_run):
    return
  model = ctx.model("policy")
  batches, steps_per_epoch = _batches(ctx, cfg, stage)
  num_steps = cfg.num_epochs * steps_per_epoch
  epoch_ends = tuple(steps_per_epoch * (i + 1) for i in range(cfg.num_epochs))
  tx = make_optimizer(cfg.optim, num_steps)
  state, shardings = supervised.create_state(
    ctx.mesh, model, tx, policies.load(ctx, "base"), ctx.key(stage)
  )
  loop.fit(
    step_run,
    state,
    supervised.make_lm_train_step(model, tx, dropout_rate=cfg.dropout, state_shardings=shardings),
    batches,
    num_steps=num_steps,
    place=lambda batch: sharding.place_batch(ctx.mesh, _join_rows(batch)),
    evaluate=_validation_loss(ctx, cfg, supervised.make_lm_evaluation(model, ctx.mesh)),
    evaluate_steps=epoch_ends,
    keep_steps=epoch_ends,
    flops=lambda metrics: 3 * flops.forward(model, metrics["tokens"], cfg.length),
    show=("loss", "grad_norm", "validation/loss", "validation/pretrain_loss"),
  )
  history = {
    row["step"]: row for row in metrics.read_metrics(step_run.directory) if "validation/loss" in row
  }
  epochs = [
    {
      "step": step,
      "validation_loss": history[step]["validation/loss"],
      "pretrain_loss": history[step]["validation/pretrain_loss"],
    }
    for step in epoch_ends
  ]
  # ppo_init is the end of its run (C.3); the SFT baseline is the best epoch.
  best = min(epochs, key=lambda e: e["validation_loss"]) if stage == "sft" else epochs[-1]
  finished.write_done(
    step_run.directory,
    {"fingerprint": step_run.fingerprint, "step": best["step"], "epochs": epochs},
  )


def select(ctx: Context, stage: str):
  """Chooses the SFT epoch by reward-model score on validation prompts, a better guide than the loss (C.1)."""
  cfg = ctx.config.evaluate
  run = stage_run(
    ctx, stage, {"evaluate": [cfg.num_prompts, cfg.temperature]}, parents=("sft", "rm")
  )
  # No training starts from here: with other settings it is chosen anew.
  if (finished.read_done(run.directory) or {}).get("fingerprint") == run.fingerprint:
    return
  model, reward_model = ctx.model("policy"), ctx.model("reward")
  reward_params = policies.load_reward(ctx)
  prompts = ctx.prompt_tokens("validation")[: cfg.num_prompts]
  epochs = []
  for epoch in finished.read_done(ctx.directory("sft"))["epochs"]:
    params = policies.load_step(ctx, "sft", epoch["step"])
    sampled = answers.sample(
      ctx, model, params, prompts, ctx.key(stage), temperature=cfg.temperature
    )
    score = answers.score(ctx, reward_model, reward_params, sampled)
    epochs.append(epoch | {"reward": float(score.mean())})
  best = max(epochs, key=lambda e: e["reward"])
  finished.write_done(
    run.directory, {"fingerprint": run.fingerprint, "step": best["step"], "epochs": epochs}
  )
