"""Chooses the SFT epoch that serves as baseline: the one whose answers the reward model scores highest (C.1).

It is a stage of its own because it needs a reward model, and the reward model needs SFT: for its comparisons and, by
`rm.start_from`, its weights. So SFT first chooses an epoch by validation loss, and this stage chooses once more.
"""

from instructjax.core import results
from instructjax.stages import answers, policies
from instructjax.stages.context import Context, finish, stage_run


def check(ctx: Context, stage: str):
  """Checks that there are validation prompts to choose by.

  Raises:
    UserError: no validation prompt is short enough.
  """
  ctx.data.prompt_tokens("validation")


def run(ctx: Context, stage: str):
  """Scores each SFT epoch's answers to validation prompts, and chooses the epoch with the highest mean.

  C.1 found the reward model's score to be a better guide than the validation loss.

  Raises:
    UserError: the weights of an epoch cannot be read.
    Preempted: the run was told to stop.
  """
  cfg = ctx.config.evaluate
  run_ = stage_run(ctx, stage)
  done = ctx.done(stage)
  # No training starts from this choice. So if the settings have changed, it is made anew, not refused.
  if done and done.fingerprint == run_.fingerprint:
    return
  model, reward_model = ctx.model("policy"), ctx.model("reward")
  reward_params = policies.load_reward(ctx)
  prompts = ctx.data.prompt_tokens("validation")[: cfg.num_prompts]
  epochs = []
  for epoch in ctx.require_done("sft").result.epochs:
    params = policies.load_step(ctx, "sft", epoch.step)
    # One key for all epochs: they differ by their weights alone.
    sampled = answers.sample(
      ctx, model, params, prompts, ctx.key(stage), temperature=cfg.temperature
    )
    score = answers.score(ctx, reward_model, reward_params, sampled)
    epochs.append(results.ScoredEpoch(**vars(epoch), reward=float(score.mean())))
  best = max(epochs, key=lambda epoch: epoch.reward)
  result = results.Selected(tuple(epochs))
  finish(ctx, stage, run_, best.step, result)
