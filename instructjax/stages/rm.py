"""Trains and measures the reward model (sec 3.5, C.2), or only measures one that is given.

The loss is eq. 1 over all pairs of a prompt's ranked answers, for one epoch. A bias then makes the demonstrations score
0 on average. Accuracy is measured on held-out prompts, on held-out labelers, and by cross-validation over labelers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructjax.core import results, terminal
from instructjax.core.config import Config, RMConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.core.structs import Params, RankedBatch, TrainState, token_mask
from instructjax.data import batching
from instructjax.data.tokenize import RankingTokens
from instructjax.models import adapters, execution, flops, heads, transformer
from instructjax.ops import preference
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.stages import answers, bases, lineage, policies
from instructjax.stages.context import Context, finish, is_finished, stage_run, tell_adapter
from instructjax.stages.ranking_accuracy import judge, tokenized
from instructjax.train import accumulation, loop, stage_runs, supervised
from instructjax.train.optim import make_optimizer, require_steps
from instructjax.train.weights import Weights

_FOLD = "a fold (rm.cross_validation_folds)"  # in messages


def scores(model: transformer.Model, params: Params, batch: RankedBatch) -> jax.Array:
  """The score of every answer, [B, C], from one forward pass over all answers; each is read at its last token."""
  score_SL = scoring.column_score(model, params, batch.token_SL, batch.segment_SL)
  return score_SL.reshape(-1)[batch.last_BC]


def make_train_step(
  model: transformer.Model,
  tx: optax.GradientTransformation,
  cfg: RMConfig,
  state_shardings: TrainState,
) -> Callable:
  """Makes the jitted step (TrainState, RankedBatch) -> (TrainState, metrics); with adapters, see `jit_step`."""

  def loss_fn(params, base, rows):
    batch, key_S = rows
    score_BC = scores(model, adapters.join(model, base, params, key_S), batch)
    loss, metrics = preference.ranked_preference_loss(
      score_BC, batch.rank_BC, batch.is_answer_BC, ties=cfg.ties
    )
    return loss, {"accuracy": metrics["accuracy"]}

  def count(batch):
    is_better_BCC, is_usable_B = preference.usable(batch.rank_BC, batch.is_answer_BC, ties=cfg.ties)
    return {"loss": jnp.sum(is_usable_B), "accuracy": jnp.sum(is_better_BCC)}

  def step(state: TrainState, *inputs):
    base, batch = adapters.base_and(model, inputs)
    if cfg.microbatches > 1:
      # A microbatch is some prompts with the rows of all their answers, so places count from its own first row.
      cells = batch.token_SL.size // cfg.microbatches
      batch = dataclasses.replace(batch, last_BC=batch.last_BC % cells)
    key = jax.random.fold_in(state.key, state.step)  # of an adapter's dropout
    rows = batch, adapters.dropout_keys(model, key, batch.token_SL.shape[0])
    of_params = lambda params, rows: loss_fn(params, base, rows)
    with jax.named_scope("gradient"):
      (loss, metrics), grads = accumulation.mean_gradient(
        of_params, state.params, rows, cfg.microbatches, lambda rows: count(rows[0])
      )
    state = supervised.apply_gradients(state, tx, grads)
    return state, {
      "loss": loss,
      "accuracy": metrics["accuracy"],
      "grad_norm": optax.tree.norm(grads),
      "tokens": jnp.sum(token_mask(batch.segment_SL)).astype(jnp.float32),
    }

  return supervised.jit_step(step, state_shardings, model)


def shares_prompts(cfg: RMConfig, model: transformer.Model) -> bool:
  """Whether the rows of a batch hold one copy of a prompt for its answers, as trees."""
  return cfg.share_prompts and not execution.why_no_trees(model.execution)


def _batches(ctx: Context, rankings: list, seed: int) -> batching.Batches:
  """Batches of `rm.batch_size` prompts.

  With `rm.row_length`, the answers of a batch share rows: as many as the fullest batch of the whole run needs, so that
  all batches have one shape and the step is compiled once. Otherwise each answer has a row of its own. Either way, rows
  hold answers of one microbatch only, so that each microbatch has all pairs of its prompts. With `rm.share_prompts` the
  answers to a prompt share its columns too, where attention takes trees.
  """
  cfg, data = ctx.config.rm, ctx.config.data
  length = cfg.row_length or data.max_prompt_length + data.max_response_length
  kwargs = dict(
    length=length,
    batch_size=cfg.batch_size,
    seed=seed,
    num_groups=cfg.microbatches,
    share_prompts=shares_prompts(cfg, ctx.model("reward")),
  )
  num_rows = None
  if cfg.row_length:
    num_rows = batching.rows_needed(rankings, num_epochs=cfg.num_epochs, **kwargs)
    shards = sharding.num_row_shards(ctx.mesh) * cfg.microbatches
    num_rows = -(-num_rows // shards) * shards  # rounded up to what the mesh divides
  rows = num_rows or cfg.batch_size * cfg.max_responses
  return batching.ranking_batches(
    rankings,
    max_responses=cfg.max_responses,
    vocab_size=ctx.tokenizer.vocab_size,
    num_rows=num_rows,
    places=(ctx.own_rows(rows), ctx.own_rows(cfg.batch_size)),
    **kwargs,
  )


def initial_params(ctx: Context, key: jax.Array) -> Params:
  """The trunk of a language model under a fresh scalar head.

  By `rm.start_from` the trunk is the SFT model's (sec 3.5) or the larger base's (C.2). With adapters the trunk is the
  SFT model's adapter or a fresh one.
  """
  from_sft, model = ctx.config.rm.start_from == "sft", ctx.model("reward")
  if from_sft:
    trunk = policies.load_sft_by_loss(ctx, policies.load_trained_step)
  elif not lineage.is_adapted(ctx.config):
    trunk = policies.load(ctx, "reward_base")
  else:
    return bases.first(ctx, lineage.frozen_stage(ctx.config, "rm"), "reward", key)
  shardings, shapes = adapters.trained_shardings(ctx.mesh, model)
  # Only the head is computed: XLA drops the rest of the fresh model, which is not returned.
  head = jax.jit(lambda k: transformer.init_params(model, k)["head"])(key)
  params = heads.scalar_params_from_lm(trunk, shapes | {"head": head})
  return jax.device_put(params, shardings)


def _stage_run(ctx: Context, stage: str, name: str) -> stage_runs.StageRun:
  """`stage_run` for the stage or for one cross-validation fold of it. A fold has its own name and folder."""
  run_ = stage_run(ctx, stage)
  return dataclasses.replace(run_, name=name, directory=ctx.directory(name))


@functools.lru_cache(maxsize=1)
def _optimizer_and_step(model: transformer.Model, cfg: RMConfig, num_steps: int, mesh: Mesh):
  """The optimiser and the step, which all folds of a cross-validation share, so that JAX traces the step only once."""
  tx = make_optimizer(cfg.optim, num_steps)
  return tx, make_train_step(model, tx, cfg, supervised.state_shardings(mesh, model, tx))


def train(ctx: Context, stage: str, name: str, records: list, key: jax.Array) -> tuple[int, Params]:
  """Trains a reward model: the stage's own, or that of a fold.

  Args:
    ctx: the run.
    stage: the stage.
    name: folder in the workdir: the stage's name, or STAGE/fold_N.
    records: rankings to train on.
    key: root key of the state and of the fresh head.
  Returns:
    (final step, parameters without the bias of C.2).
  Raises:
    StageStopped: a metric is not finite.
    UserError: the folder was made with other settings, or files cannot be read or written.
    Preempted: the run was told to stop.
  """
  cfg, model = ctx.config.rm, ctx.model("reward")
  batches = _batches(ctx, tokenized(ctx, records), ctx.data_seed(name))
  num_steps = cfg.num_epochs * batches.steps_per_epoch
  require_steps(cfg.optim, num_steps, "config.rm.optim", name)
  length = ctx.config.data.max_prompt_length + ctx.config.data.max_response_length
  cfg = dataclasses.replace(cfg, optim=lineage.optim(ctx.config, cfg.optim))
  tx, train_step = _optimizer_and_step(model, cfg, num_steps, ctx.mesh)  # pyrefly: ignore[bad-argument-type]  flax gives Modules a hash
  base = bases.base(ctx, stage)
  state, _ = supervised.create_state(ctx.mesh, model, tx, initial_params(ctx, key), key)
  tell_adapter(ctx, name, "reward", cfg.optim)
  if cfg.share_prompts and not shares_prompts(cfg, model) and jax.process_index() == 0:
    why = execution.why_no_trees(model.execution)
    terminal.say(f"{name}: each answer keeps a copy of its prompt: {why}")
  state = loop.fit(
    _stage_run(ctx, stage, name),
    state,
    train_step,
    batches,
    num_steps=num_steps,
    constants=base,
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    flops=lambda metrics: flops.training(model, metrics["tokens"], length),
    show=("loss", "accuracy", "grad_norm"),
  )
  return num_steps, adapters.joined(model, base, state.params)


def demonstration_mean(ctx: Context, params: Params) -> float:
  """The mean score of the labelers' demonstrations, which the bias takes away (C.2).

  Eq. 1 fixes scores only up to a constant. With this bias, 0 means as good as an average demonstration.
  """
  return answers.demonstration_mean(ctx, ctx.model("reward"), params)


def fold_labelers(ctx: Context, stage: str) -> list[set[str]]:
  """Splits the labelers into the folds of the cross-validation; [] if it is off, as in all rounds after the first.

  Raises:
    UserError: the comparisons name too few labelers, or no labeler of a fold ranked a held-out prompt.
  """
  folds = ctx.config.rm.cross_validation_folds
  if not folds or STAGES[stage].round > 1:
    return []
  named = [
    {record.labeler for record in ctx.data.rankings(stage, split) if record.labeler is not None}
    for split in ("train", "validation")
  ]
  labelers = sorted(named[0])  # sets have no order, and a resumed run must find the same folds
  result = [set(labelers[fold::folds]) for fold in range(folds)]
  if not all(outside & named[1] for outside in result):
    raise UserError(
      f"rm.cross_validation_folds={folds} must leave each fold a labeler with held-out rankings, and the"
      f" comparisons name {len(labelers)} labelers; set it to 0 or add a 'labeler' to each row"
    )
  return result


def cross_validate(ctx: Context, stage: str) -> tuple[results.Fold, ...]:
  """Measures how well the reward model predicts labelers whom it never saw (sec 4.1).

  For each fold of labelers a reward model is trained on the rankings of all others. It is then judged on held-out
  prompts, once as ranked by the fold and once as ranked by the others: the difference is due to the labelers.

  Raises:
    UserError: see `fold_labelers` and `train`.
    Preempted: the run was told to stop.
  """
  cfg = ctx.config.rm
  train_records, held_out = (ctx.data.rankings(stage, split) for split in ("train", "validation"))
  found = []
  for fold, outside in enumerate(fold_labelers(ctx, stage)):
    inside = [r for r in train_records if r.labeler not in outside][: cfg.cross_validation_prompts]
    name = f"{stage}/fold_{fold}"
    _, params = train(ctx, stage, name, inside, ctx.key(name))
    found.append(
      results.Fold(
        heldout=judge(ctx, params, [r for r in held_out if r.labeler in outside]).accuracy,
        train=judge(ctx, params, [r for r in held_out if r.labeler not in outside]).accuracy,
      )
    )
  return tuple(found)


def _require_decided(ctx: Context, rankings: Sequence[RankingTokens], what: str):
  """Checks that some pair of answers is no tie, without which there is nothing to learn or to measure.

  Raises:
    UserError: all pairs are ties.
  """
  if not any(len(set(item.ranks)) > 1 for item in rankings):
    raise UserError(
      f"data.comparisons={ctx.config.data.comparisons!r}: none of the {len(rankings)} {what} has a pair of answers"
      " that is not a tie; add rankings with an order"
    )


def _require_steps(cfg: RMConfig, num_rankings: int, what: str):
  """Checks that a training on so many rankings is longer than its warmup; `what` names it.

  Raises:
    UserError: it is not.
  """
  num_steps = cfg.num_epochs * -(-num_rankings // cfg.batch_size)
  require_steps(cfg.optim, num_steps, "config.rm.optim", what)


def check_settings(config: Config, stage: str):
  """Checks the warmup, where the config says how many rankings are collected at most.

  Raises:
    UserError: the warmup is as long as the stage, or as a fold of it.
  """
  cfg, most = config.rm, config.collect.num_prompts * STAGES[stage].round
  if lineage.given(config, stage) or not lineage.collects(config):
    return
  _require_steps(cfg, most, "the stage")
  if cfg.cross_validation_folds and STAGES[stage].round == 1:
    _require_steps(cfg, min(most, cfg.cross_validation_prompts), _FOLD)


def check(ctx: Context, stage: str):
  """Checks that there is something to learn and to measure, and that the labelers can be split into folds.

  Raises:
    UserError: every ranking of a split or of a fold is too long or a tie, a prompt has too many answers, the warmup is
      as long as the stage or a fold of it, or the labelers cannot be split.
  """
  if lineage.collects(ctx.config) or STAGES[stage].round > 1:
    return  # these comparisons are collected only later in the run
  cfg = ctx.config.rm
  if stage in ctx.given:
    if "comparisons" in lineage.reads(ctx.config, stage):
      held_out = tokenized(ctx, ctx.data.rankings(stage, "validation"))
      _require_decided(ctx, held_out, "held-out rankings")
    return
  train_rankings, held_out = (
    tokenized(ctx, ctx.data.rankings(stage, split)) for split in ("train", "validation")
  )
  _require_decided(ctx, train_rankings, "training rankings")
  _require_decided(ctx, held_out, "held-out rankings")
  for fold, outside in enumerate(fold_labelers(ctx, stage)):
    parts = (
      ("training", train_rankings, False),
      ("held-out", held_out, True),
      ("held-out", held_out, False),
    )
    for name, rankings, is_in in parts:
      found = [item for item in rankings if (item.labeler in outside) == is_in]
      whose = "labelers" if is_in else "other labelers"
      _require_decided(
        ctx, found, f"{name} rankings by the {whose} of fold {fold} (rm.cross_validation_folds)"
      )
    inside = sum(item.labeler not in outside for item in train_rankings)
    _require_steps(cfg, min(inside, cfg.cross_validation_prompts), _FOLD)
  _require_steps(cfg, len(train_rankings), "the stage")


def measure_given(ctx: Context, stage: str, given: Weights) -> results.RewardModel:
  """Finds the bias of a finished reward model, and measures it on the rankings that there are.

  It is judged on the same held-out prompts as a trained one: it may come from a run that was trained on the others.

  Raises:
    UserError: the files cannot be read, or the held-out rankings are all ties.
    Preempted: the run was told to stop.
  """
  reads = lineage.reads(ctx.config, stage)
  params = bases.given(ctx, stage, is_trained=False)
  judged = lambda split: judge(ctx, params, ctx.data.rankings(stage, split))
  has_heldout = lineage.collects(ctx.config)
  return results.RewardModel(
    demonstration_mean=demonstration_mean(ctx, params) if "demonstrations" in reads else None,
    validation=judged("validation") if "comparisons" in reads else None,
    heldout_labelers=judged("heldout") if has_heldout else None,
    cross_validation=(),
  )


def told(cfg: RMConfig, stage: str, given: Weights, result: results.RewardModel) -> list[str]:
  """The lines that say what a finished reward model was found to be, and what could not be measured."""
  lines = [f"{stage} {given.path}: a finished reward model, used as it is; {given.end_of_score}"]
  if result.validation is None:
    lines.append(
      f"{stage} data.comparisons names no rankings: how often it agrees with people is not measured"
    )
  else:
    accuracy, pairs = result.validation.accuracy, result.validation.pairs
    lines.append(f"{stage} accuracy {accuracy:.3f} on {pairs} held-out pairs")
  if result.demonstration_mean is None:
    lines.append(
      f"{stage} data.demonstrations names none: scores keep the zero point of the file, where C.2 makes 0 that"
      " of an average demonstration"
    )
  else:
    mean = result.demonstration_mean
    lines.append(
      f"{stage} demonstrations scored {mean:.4g} on average, which the bias makes 0 (C.2)"
    )
  if cfg.cross_validation_folds:
    lines.append(
      f"{stage} cross_validation_folds={cfg.cross_validation_folds} has no effect: each fold would train a reward model"
    )
  return lines


def run(ctx: Context, stage: str):
  """Trains `rm`, finds its bias, and measures it on held-out prompts and held-out labelers.

  A reward model that the config gives is measured only.

  Raises:
    StageStopped: a metric is not finite.
    UserError: the stage was made with other settings, the held-out rankings are all ties, or files cannot be read or
      written.
    Preempted: the run was told to stop.
  """
  run_ = _stage_run(ctx, stage, stage)
  if is_finished(run_):
    return
  given = ctx.given.get(stage)
  if given:
    found = measure_given(ctx, stage, given)
    if jax.process_index() == 0:
      for line in told(ctx.config.rm, stage, given, found):
        terminal.say(line)
    finish(ctx, stage, run_, None, found)
    return
  records = lambda split: ctx.data.rankings(stage, split)
  num_steps, params = train(ctx, stage, stage, records("train"), ctx.key(stage))
  has_heldout = lineage.collects(ctx.config)
  result = results.RewardModel(
    demonstration_mean=demonstration_mean(ctx, params),
    validation=judge(ctx, params, records("validation")),
    heldout_labelers=judge(ctx, params, records("heldout")) if has_heldout else None,
    cross_validation=cross_validate(ctx, stage),
  )
  finish(ctx, stage, run_, num_steps, result)
