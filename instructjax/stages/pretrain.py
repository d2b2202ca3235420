"""Pretrains a base model on documents. It stands in for GPT-3 when the config gives no weights."""

from instructjax.core import results
from instructjax.core.config import Config, PretrainConfig
from instructjax.core.stages import STAGES
from instructjax.models import flops
from instructjax.parallel import sharding
from instructjax.stages.context import Context, bare, finish, is_finished, stage_run
from instructjax.stages.text_rows import document_batches, validation_rows
from instructjax.train import loop, saved_state, supervised
from instructjax.train.optim import make_optimizer, require_steps


def check_settings(config: Config, stage: str):
  """Checks the stage's settings.

  Raises:
    UserError: the warmup is as long as the stage.
  """
  block = STAGES[stage].block
  cfg: PretrainConfig = getattr(config, block)
  require_steps(cfg.optim, cfg.num_steps, f"config.{block}.optim")


def run(ctx: Context, stage: str):
  """Trains `pretrain` (the policy's base) or `reward_pretrain` (the reward model's base).

  Later stages start from the step with the lowest held-out loss, not from the last one, because a model that reads a
  small text many times ends up overfitting it.

  Raises:
    StageStopped: a metric is not finite.
    UserError: the stage was made with other settings, or files cannot be read or written.
    Preempted: the run was told to stop.
  """
  cfg: PretrainConfig = getattr(ctx.config, STAGES[stage].block)
  role = STAGES[stage].require_role()
  step_run = stage_run(ctx, stage)
  if is_finished(step_run):
    return
  model = bare(ctx.model(role))
  tx = make_optimizer(cfg.optim, cfg.num_steps)
  key = ctx.key(stage)
  params = supervised.init_params(ctx.mesh, model, key)
  state, shardings = supervised.create_state(ctx.mesh, model, tx, params, key)
  evaluate = supervised.make_lm_evaluation(model, ctx.mesh, ctx.config.pretrain.microbatches)
  held_out = validation_rows(ctx, cfg.length)
  loop.fit(
    step_run,
    state,
    supervised.make_lm_train_step(
      model, tx, dropout_rate=0.0, state_shardings=shardings, microbatches=cfg.microbatches
    ),
    document_batches(
      ctx, "train", length=cfg.length, batch_size=cfg.batch_size, seed=ctx.data_seed(stage)
    ),
    num_steps=cfg.num_steps,
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    evaluate=lambda state, step: {"loss": evaluate(state.params, held_out)},
    evaluate_steps=loop.Steps(every=cfg.evaluate_every, also=(cfg.num_steps,)),
    best_metric="validation/loss",
    flops=lambda metrics: 3 * flops.forward(model, metrics["tokens"], cfg.length),
    show=("loss", "grad_norm", "validation/loss"),
  )
  step, loss = saved_state.best_step(step_run.directory, "validation/loss")
  result = results.Pretrained(validation_loss=loss)
  finish(ctx, stage, step_run, step, result)
