"""Which SFT epoch is the baseline: the one whose answers the reward model likes best (C.1)."""

from instructjax.core import results
from instructjax.stages import answers, policies
from instructjax.stages.context import Context, finish, stage_run


def check(ctx: Context, stage: str):
  """Raises UserError where no validation prompt fits, so that there is nothing to choose by."""
  ctx.data.prompt_tokens("validation")


def run(ctx: Context, stage: str):
  """Chooses the SFT epoch by reward-model score on validation prompts, a better guide than the loss (C.1)."""
  cfg = ctx.config.evaluate
  run_ = stage_run(ctx, stage, [cfg.num_prompts, cfg.temperature])
  done = ctx.done(stage)
  # No training starts from here: with other settings it is chosen anew.
  if done and done.fingerprint == run_.fingerprint:
    return
  model, reward_model = ctx.model("policy"), ctx.model("reward")
  reward_params = policies.load_reward(ctx)
  prompts = ctx.data.prompt_tokens("validation")[: cfg.num_prompts]
  epochs = []
  for epoch in ctx.require_done("sft").result.epochs:
    params = policies.load_step(ctx, "sft", epoch.step)
    sampled = answers.sample(
      ctx, model, params, prompts, ctx.key(stage), temperature=cfg.temperature
    )
    score = answers.score(ctx, reward_model, reward_params, sampled)
    epochs.append(results.ScoredEpoch(**vars(epoch), reward=float(score.mean())))
  best = max(epochs, key=lambda epoch: epoch.reward)
  result = results.Selected(tuple(epochs))
  finish(ctx, stage, run_, best.step, result)
