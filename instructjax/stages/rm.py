"""Reward model (sec 3.5, C.2): eq. 1 over all pairs of a prompt's answers, one epoch, demonstrations at mean 0."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from instructjax.core import results
from instructjax.core.config import RMConfig
from instructjax.core.errors import UserError
from instructjax.core.structs import Params, RankedBatch, TrainState
from instructjax.data import batching
from instructjax.data.tokenize import RankingTokens, tokenize_rankings
from instructjax.models import flops, heads, transformer
from instructjax.ops import preference
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.stages import answers, lineage, policies
from instructjax.stages.context import Context, finish, is_finished, stage_run
from instructjax.train import loop, supervised
from instructjax.train.optim import make_optimizer


def scores(model: transformer.Model, params: Params, batch: RankedBatch) -> jax.Array:
  """Score of every answer, [B, C]: one forward over all answers, each read at its last token."""
  score_SL = scoring.column_score(model, params, batch.token_SL, batch.segment_SL)
  return score_SL.reshape(-1)[batch.last_BC]


def make_train_step(
  model: transformer.Model,
  tx: optax.GradientTransformation,
  cfg: RMConfig,
  state_shardings: TrainState,
) -> Callable:
  """Jitted (TrainState, RankedBatch) -> (TrainState, metrics)."""

  def loss_fn(params, batch):
    score_BC = scores(model, params, batch)
    return preference.ranked_preference_loss(
      score_BC, batch.rank_BC, batch.is_answer_BC, ties=cfg.ties
    )

  def step(state: TrainState, batch: RankedBatch):
    with jax.named_scope("gradient"):
      (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    state = supervised.apply_gradients(state, tx, grads)
    return state, {
      "loss": loss,
      "accuracy": metrics["accuracy"],
      "grad_norm": optax.tree.norm(grads),
      "tokens": jnp.sum(batch.segment_SL > 0).astype(jnp.float32),
    }

  return supervised.jit_step(step, state_shardings, model)


def tokenized(ctx: Context, records: list) -> list:
  """Rankings as token lists; over-long ones are filtered and counted by the data pipeline."""
  data = ctx.config.data
  rankings, _ = tokenize_rankings(
    records,
    ctx.tokenizer,
    max_prompt_length=data.max_prompt_length,
    max_response_length=data.max_response_length,
  )
  most = max((len(item.responses) for item in rankings), default=0)
  if most > ctx.config.rm.max_responses:
    raise UserError(
      f"a prompt has {most} ranked responses; raise rm.max_responses={ctx.config.rm.max_responses}"
    )
  return rankings


def _batches(ctx: Context, records: list, seed: int) -> batching.Batches:
  """Batches of `rm.batch_size` prompts; their answers share as many rows as the fullest batch needs, or none."""
  cfg, data = ctx.config.rm, ctx.config.data
  rankings = tokenized(ctx, records)
  length = cfg.row_length or data.max_prompt_length + data.max_response_length
  kwargs = dict(length=length, batch_size=cfg.batch_size, seed=seed)
  num_rows = None
  if cfg.row_length:
    num_rows = batching.rows_needed(rankings, num_epochs=cfg.num_epochs, **kwargs)
    shards = sharding.num_row_shards(ctx.mesh)
    num_rows = -(-num_rows // shards) * shards
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
  """An LM's trunk with a fresh scalar head: the SFT model's (sec 3.5) or the larger base's (C.2)."""
  from_sft = ctx.config.rm.start_from == "sft"
  trunk = policies.load_sft_by_loss(ctx) if from_sft else policies.load(ctx, "reward_base")
  model = ctx.model("reward")
  shardings, shapes = transformer.param_shardings(ctx.mesh, model)
  # Of a fresh model only the head is made: XLA leaves out what nobody asks for.
  head = jax.jit(lambda k: transformer.init_params(model, k)["head"])(key)
  params = heads.scalar_params_from_lm(trunk, shapes | {"head": head})
  return jax.device_put(params, shardings)


def _stage_run(ctx: Context, name: str) -> loop.StageRun:
  """Of the stage, or of one of its folds, which keep their checkpoints apart."""
  run_ = stage_run(ctx, "rm", ctx.config.rm, model=ctx.config.reward_model, data=ctx.config.data)
  return dataclasses.replace(run_, name=name, directory=ctx.directory(name))


@functools.lru_cache(maxsize=1)
def _optimizer_and_step(model: transformer.Model, cfg: RMConfig, num_steps: int, mesh: Mesh):
  """One of each for all folds of a cross-validation: what JAX has traced for one, it runs for the next."""
  tx = make_optimizer(cfg.optim, num_steps)
  return tx, make_train_step(model, tx, cfg, supervised.state_shardings(mesh, model, tx))


def train(ctx: Context, name: str, records: list, key: jax.Array) -> tuple[int, Params]:
  """Trains the stage's reward model, or a fold's, on `records`; returns (final step, params without the bias)."""
  cfg, model = ctx.config.rm, ctx.model("reward")
  batches = _batches(ctx, records, ctx.data_seed(name))
  num_steps = cfg.num_epochs * batches.steps_per_epoch
  length = ctx.config.data.max_prompt_length + ctx.config.data.max_response_length
  tx, train_step = _optimizer_and_step(model, cfg, num_steps, ctx.mesh)  # pyrefly: ignore[bad-argument-type]  flax gives Modules a hash
  state, _ = supervised.create_state(ctx.mesh, model, tx, initial_params(ctx, key), key)
  state = loop.fit(
    _stage_run(ctx, name),
    state,
    train_step,
    batches,
    num_steps=num_steps,
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    flops=lambda metrics: 3 * flops.forward(model, metrics["tokens"], length),
    show=("loss", "accuracy", "grad_norm"),
  )
  return num_steps, state.params


def score_rankings(
  ctx: Context, params: Params, rankings: Sequence[RankingTokens]
) -> list[np.ndarray]:
  """Scores of each ranking's answers, in order."""
  sequences = [item.prompt + response for item in rankings for response in item.responses]
  score_N = answers.score_tokens(ctx, ctx.model("reward"), params, sequences)
  return np.split(score_N, np.cumsum([len(item.responses) for item in rankings])[:-1])


def pair_margins(score_K: np.ndarray, rank_K: Sequence[int]) -> np.ndarray:
  """Score of the preferred answer minus the other's, for each pair that is not a tie."""
  return np.array(
    [
      score_K[i] - score_K[j] if rank_K[i] < rank_K[j] else score_K[j] - score_K[i]
      for i, j in itertools.combinations(range(len(rank_K)), 2)
      if rank_K[i] != rank_K[j]
    ]
  )


def _calibration(margin_N: np.ndarray) -> results.Calibration:
  found = preference.calibration(margin_N)
  plain = {name: np.asarray(value).tolist() for name, value in found._asdict().items()}
  bins = {name: tuple(value) for name, value in plain.items() if name != "expected_error"}
  return results.Calibration(**bins, expected_error=plain["expected_error"])


def judge(ctx: Context, params: Params, records: list) -> results.Judgement:
  """Accuracy over untied pairs with its standard error over prompts, calibration, and the spread of scores."""
  rankings = tokenized(ctx, records)
  score = score_rankings(ctx, params, rankings)
  margins = [pair_margins(s, item.ranks) for s, item in zip(score, rankings)]
  # A prompt may be ranked several times: its rankings hang together, so that it counts as one.
  _, which = np.unique([str(item.prompt) for item in rankings], return_inverse=True)
  right = np.bincount(which, [np.sum(m > 0) for m in margins])
  total = np.bincount(which, [len(m) for m in margins])
  if not total.sum():
    raise UserError(
      f"{len(records)} held-out rankings hold no pair that is not a tie; add rankings with an order"
    )
  accuracy = right.sum() / total.sum()
  stderr = np.sqrt(np.sum((right - accuracy * total) ** 2)) / total.sum()
  return results.Judgement(
    accuracy=float(accuracy),
    accuracy_stderr=float(stderr),
    pairs=int(total.sum()),
    prompts=len(total),
    score_std=float(np.std(np.concatenate(score))),
    calibration=_calibration(np.concatenate(margins)),
  )


def demonstration_mean(ctx: Context, params: Params) -> float:
  """Mean score of labelers' demonstrations, which the bias subtracts (C.2)."""
  kept = ctx.data.demonstration_tokens("train")
  ended = [item.response + [ctx.tokenizer.eos_id] for item in kept]
  demonstrations = answers.from_tokens(ctx, [item.prompt for item in kept], ended)
  return float(np.mean(answers.score(ctx, ctx.model("reward"), params, demonstrations)))


def fold_labelers(ctx: Context) -> list[set[str]]:
  """The labelers of each fold of the cross-validation; [] when it is off.

  Raises:
    UserError: too few labelers are named, or nobody of a fold ranked a held-out prompt.
  """
  folds = ctx.config.rm.cross_validation_folds
  if not folds:
    return []
  named = [
    {
      record.labeler
      for record in ctx.data.records("comparisons", split)
      if record.labeler is not None
    }
    for split in ("train", "validation")
  ]
  labelers = sorted(named[0])
  result = [set(labelers[fold::folds]) for fold in range(folds)]
  if not all(outside & named[1] for outside in result):
    raise UserError(
      f"rm.cross_validation_folds={folds} must leave each fold a labeler with held-out rankings, and the"
      f" comparisons name {len(labelers)} labelers; set it to 0 or add a 'labeler' to each row"
    )
  return result


def cross_validate(ctx: Context) -> tuple[results.Fold, ...]:
  """Trains on all but one fold of labelers, and judges on that fold and on the others' held-out prompts (sec 4.1)."""
  cfg = ctx.config.rm
  train_records, held_out = (
    ctx.data.records("comparisons", split) for split in ("train", "validation")
  )
  found = []
  for fold, outside in enumerate(fold_labelers(ctx)):
    inside = [r for r in train_records if r.labeler not in outside][: cfg.cross_validation_prompts]
    name = f"rm/fold_{fold}"
    _, params = train(ctx, name, inside, ctx.key(name))
    found.append(
      results.Fold(
        heldout=judge(ctx, params, [r for r in held_out if r.labeler in outside]).accuracy,
        train=judge(ctx, params, [r for r in held_out if r.labeler not in outside]).accuracy,
      )
    )
  return tuple(found)


def check(ctx: Context, stage: str):
  """Raises UserError where labelers cannot be split into folds. Those who are simulated rank later."""
  if not lineage.collects(ctx.config):
    fold_labelers(ctx)


def run(ctx: Context, stage: str):
  """Trains `rm`, sets its bias and measures it on held-out prompts and on held-out labelers."""
  run_ = _stage_run(ctx, stage)
  if is_finished(run_):
    return
  num_steps, params = train(ctx, stage, ctx.data.records("comparisons", "train"), ctx.key(stage))
  records = lambda split: ctx.data.records("comparisons", split)
  has_heldout = lineage.collects(ctx.config)
  result = results.RewardModel(
    demonstration_mean=demonstration_mean(ctx, params),
    validation=judge(ctx, params, records("validation")),
    heldout_labelers=judge(ctx, params, records("heldout")) if has_heldout else None,
    cross_validation=cross_validate(ctx),
  )
  finish(ctx, stage, run_, num_steps, result)
