"""About how long a run still takes: the work of the stages to come, at the speed of the stages that are done.

Called by pipeline. The work is counted in FLOPs by the sizes that the config names, so that a speed measured on one
stage says something about the others. Compilation, padding and saving are not counted, and answers are taken to be half
as long as they may be: the result is good for "about".
"""

from collections.abc import Iterable

from instructjax.core.stages import STAGES, RoleName
from instructjax.models import flops
from instructjax.stages import lineage
from instructjax.stages.context import Context
from instructjax.train import metrics

_TRAIN = 3  # passes of a training step: one forward, and backward as much as two
# A token that is sampled takes as long as so many that are read: the weights are read anew for each of them. 2.8 in
# docs/performance.md, "How cost grows".
_SAMPLE = 3


def work(ctx: Context, stage: str) -> float:
  """About the FLOPs of a stage."""
  config, row = ctx.config, STAGES[stage]
  if lineage.given(config, stage):  # it only reads some answers
    return 0.0
  data = config.data
  # Tokens of a prompt with its answer.
  answer = (data.max_prompt_length + data.max_response_length) / 2

  def read(role: RoleName, tokens: float) -> float:
    return flops.forward(ctx.model(role), tokens, int(answer))

  if row.kind == "base":
    cfg = getattr(config, row.block)
    tokens = cfg.num_steps * cfg.batch_size * cfg.length
    return _TRAIN * flops.forward(ctx.model(row.require_role()), tokens, cfg.length)
  if row.kind == "sft":
    cfg = getattr(config, row.block)
    rows = len(ctx.data.tokens("demonstrations", "train").store()) * (1 + cfg.pretrain_mix)
    return _TRAIN * cfg.num_epochs * read("policy", rows * answer)
  if row.kind == "collect":
    cfg = config.collect
    prompts = cfg.num_prompts + cfg.num_heldout_prompts
    return _SAMPLE * read("policy", prompts * cfg.max_responses * answer)
  if row.kind == "rm":
    cfg = config.rm
    collects = lineage.collects(config)
    prompts = (
      config.collect.num_prompts * row.round
      if collects
      else len(ctx.data.records("comparisons", "train"))
      + config.collect.num_prompts * (row.round - 1)
    )
    if row.round == 1:
      prompts += cfg.cross_validation_folds * min(prompts, cfg.cross_validation_prompts)
    return _TRAIN * cfg.num_epochs * read("reward", prompts * cfg.max_responses * answer)
  if row.kind == "rl":
    cfg = lineage.variant(config, stage)
    tokens = cfg.num_iterations * cfg.batch_size * answer
    text = cfg.num_iterations * cfg.batch_size * cfg.ptx_rows * cfg.ptx_length * (cfg.gamma > 0)
    policy, scalar = read("policy", tokens), read("reward", tokens)
    value = scalar * cfg.has_value_network
    updates = cfg.num_epochs * _TRAIN * (policy + value + read("policy", text))
    return (_SAMPLE + 1) * policy + scalar + value + updates
  if row.kind == "best_of_n":
    cfg = config.best_of_n
    prompts = cfg.num_prompts or len(ctx.data.prompt_tokens("train"))
    tokens = prompts * cfg.n * answer
    return _SAMPLE * read("policy", tokens) + read("reward", tokens)
  if row.kind == "evaluate":
    cfg = config.evaluate
    judged = sum(STAGES[name].policy is not None for name in lineage.line(config, stage))
    judged += sum(len(lineage.kept_steps(config, name)) for name in lineage.rl_stages(config))
    answers = judged * cfg.num_prompts * cfg.samples_per_prompt
    answers += cfg.best_of_n_prompts * cfg.best_of_n
    return (_SAMPLE + 1) * read("policy", answers * answer) + read("reward", answers * answer)
  return 0.0  # sft_select scores a few answers


def seconds_left(ctx: Context, coming: Iterable[str], finished: Iterable[str]) -> float | None:
  """About the seconds that the coming stages take; None if no finished one says how fast the machine is.

  Args:
    ctx: the run.
    coming: stages to run, of which the first may be half done.
    finished: stages that are done. The records of sft and rm among them are counted, and are read if nobody has yet.
  """
  seconds, done = 0.0, 0.0
  for stage in finished:
    records = metrics.read_metrics(ctx.directory(stage))
    if records:
      seconds += sum(record.get("seconds", 0.0) for record in records)
      done += work(ctx, stage)
  if not seconds or not done:
    return None
  return sum(work(ctx, stage) * (1 - _share_done(ctx, stage)) for stage in coming) * seconds / done


def _share_done(ctx: Context, stage: str) -> float:
  """The share of a stage's steps that an earlier run has done, where the config says how many there are."""
  row = STAGES[stage]
  steps = {
    "base": lambda: getattr(ctx.config, row.block).num_steps,
    "rl": lambda: lineage.variant(ctx.config, stage).num_iterations,
  }
  records = metrics.read_metrics(ctx.directory(stage)) if row.kind in steps else []
  return min(1.0, records[-1]["step"] / steps[row.kind]()) if records else 0.0


def words(seconds: float) -> str:
  """A time in words, as coarse as the estimate is."""
  if seconds < 90:
    return f"{max(10, round(seconds, -1)):.0f} s"
  if seconds < 90 * 60:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
