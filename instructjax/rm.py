"""Reward model (sec 3.5, C.2): eq. 1 over all pairs of a prompt's answers, one epoch, demonstrations at mean 0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructjax import answers, checkpoint, loop, policies, scoring, sharding, supervised
from instructjax.config import RMConfig
from instructjax.context import Context, finished, stage_run
from instructjax.data import pipeline as data_pipeline
from instructjax.models import flops, heads, transformer
from instructjax.ops import preference
from instructjax.optim import make_optimizer
from instructjax.structs import RankedBatch, TrainState


def scores(model, params, batch: RankedBatch):
  """Score of every answer, [B, C]: one forward over all answers, each read at its last token."""
  rows = batch.token_BCL.shape[:2]
  flat = lambda x: x.reshape(rows[0] * rows[1], -1)  # noqa: E731
  score_S = scoring.sequence_score(model, params, flat(batch.token_BCL), flat(batch.is_token_BCL))
  return score_S.reshape(rows)


_jitted_scores = jax.jit(scores, static_argnames="model")


def make_train_step(model, tx, cfg: RMConfig, state_shardings):
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
      "tokens": jnp.sum(batch.is_token_BCL & batch.is_answer_BC[..., None]).astype(jnp.float32),
    }

  return supervised.jit_step(step, state_shardings)


def _tokenized(ctx: Context, records: list) -> list:
  """Rankings as token lists; over-long ones are filtered and counted by the data pipeline."""
  data = ctx.config.data
  rankings, _ = data_pipeline.tokenize_rankings(
    records,
    ctx.tokenizer,
    max_prompt_length=data.max_prompt_length,
    max_response_length=data.max_response_length,
  )
  most = max((len(item.responses) for item in rankings), default=0)
  if most > ctx.config.rm.max_responses:
    raise ValueError(
      f"a prompt has {most} ranked responses; raise rm.max_responses={ctx.config.rm.max_responses}"
    )
  return rankings


def _batches(ctx: Context, records: list, *, batch_size: int, seed: int):
  data = ctx.config.data
  return data_pipeline.ranking_batches(
    _tokenized(ctx, records),
    max_responses=ctx.config.rm.max_responses,
    batch_size=batch_size,
    seed=seed,
    length=data.max_prompt_length + data.max_response_length,
    vocab_size=ctx.tokenizer.vocab_size,
    places=ctx.own_rows(batch_size),
  )


def initial_params(ctx: Context, key):
  """An LM's trunk with a fresh scalar head: the SFT model's (sec 3.5) or the larger base's (C.2)."""
  from_sft = ctx.config.rm.start_from == "sft"
  trunk = policies.load_sft_by_loss(ctx) if from_sft else policies.load(ctx, "reward_base")
  shardings, _ = transformer.param_shardings(ctx.mesh, ctx.model("reward"))
  scalar_init = supervised.init_params(ctx.mesh, ctx.model("reward"), key)
  params = heads.scalar_params_from_lm(trunk, scalar_init)
  return jax.device_put(params, shardings)


def _stage_run(ctx: Context, stage: str) -> loop.StageRun:
  parents = ("sft" if ctx.config.rm.start_from == "sft" else policies.stage_of(ctx, "reward_base"),)
  blocks = {"model": ctx.config.reward_model, "stage": ctx.config.rm, "data": ctx.config.data}
  return stage_run(ctx, stage, blocks, parents=parents + ("collect",) * ctx.collects)


def train(ctx: Context, stage: str, records: list, key):
  """Trains one reward model on `records`; returns (final step, params without the bias)."""
  cfg, model = ctx.config.rm, ctx.model("reward")
  batches = _batches(ctx, records, batch_size=cfg.batch_size, seed=ctx.data_seed(stage))
  num_steps = cfg.num_epochs * batches.steps_per_epoch
  length = ctx.config.data.max_prompt_length + ctx.config.data.max_response_length
  tx = make_optimizer(cfg.optim, num_steps)
  state, shardings = supervised.create_state(ctx.mesh, model, tx, initial_params(ctx, key), key)
  state = loop.fit(
    _stage_run(ctx, stage),
    state,
    make_train_step(model, tx, cfg, shardings),
    batches,
    num_steps=num_steps,
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    flops=lambda metrics: 3 * flops.forward(model, metrics["tokens"], length),
    show=("loss", "accuracy", "grad_norm"),
  )
  return num_steps, state.params


def score_rankings(ctx: Context, params, records: list) -> list[np.ndarray]:
  """Scores of each record's answers, in order; what is over-long is left out."""
  model = ctx.model("reward")
  tokenized, batch_size = _tokenized(ctx, records), ctx.config.rm.batch_size
  data = ctx.config.data
  result = []
  for start in range(0, len(tokenized), batch_size):
    chunk = tokenized[start : start + batch_size]
    filled = chunk + tokenized[:1] * (batch_size - len(chunk))
    batch = data_pipeline.ranked_batch(
      filled,
      max_responses=ctx.config.rm.max_responses,
      length=data.max_prompt_length + data.max_response_length,
      vocab_size=ctx.tokenizer.vocab_size,
    )
    score_BC = sharding.to_host(_jitted_scores(model, params, sharding.place_rows(ctx.mesh, batch)))
    result += [row[: len(item.ranks)] for row, item in zip(score_BC, chunk)]
  return result


def pair_margins(score_K: np.ndarray, rank_K) -> np.ndarray:
  """Score of the preferred answer minus the other's, for each pair that is not a tie."""
  return np.array(
    [
      score_K[i] - score_K[j] if rank_K[i] < rank_K[j] else score_K[j] - score_K[i]
      for i, j in itertools.combinations(range(len(rank_K)), 2)
      if rank_K[i] != rank_K[j]
    ]
  )


def _plain(calibration: preference.Calibration) -> dict:
  return {name: np.asarray(value).tolist() for name, value in calibration._asdict().items()}


def judge(ctx: Context, params, records: list) -> dict:
  """Accuracy over untied pairs with its standard error over prompts, calibration, and the spread of scores."""
  score = score_rankings(ctx, params, records)
  tokenized = _tokenized(ctx, records)
  margins = [pair_margins(s, item.ranks) for s, item in zip(score, tokenized)]
  # A prompt may be ranked several times: its rankings hang together, so that it counts as one.
  _, which = np.unique([str(item.prompt) for item in tokenized], return_inverse=True)
  right = np.bincount(which, [np.sum(m > 0) for m in margins])
  total = np.bincount(which, [len(m) for m in margins])
  if not total.sum():
    raise ValueError(
      f"{len(records)} held-out rankings hold no pair that is not a tie; add rankings with an order"
    )
  accuracy = right.sum() / total.sum()
  stderr = np.sqrt(np.sum((right - accuracy * total) ** 2)) / total.sum()
  return {
    "accuracy": float(accuracy),
    "accuracy_stderr": float(stderr),
    "pairs": int(total.sum()),
    "prompts": len(total),
    "score_std": float(np.std(np.concatenate(score))),
    "calibration": _plain(preference.calibration(np.concatenate(margins))),
  }


def demonstration_mean(ctx: Context, params) -> float:
  """Mean score of labelers' demonstrations, which the bias subtracts (C.2)."""
  data = ctx.config.data
  kept, _ = data_pipeline.tokenize_demonstrations(
    ctx.records("demonstrations", "train"),
    ctx.tokenizer,
    max_prompt_length=data.max_prompt_length,
    max_response_length=data.max_response_length,
  )
  ended = [item.response + [ctx.tokenizer.eos_id] for item in kept]
  demonstrations = answers.from_tokens(ctx, [item.prompt for item in kept], ended)
  return float(np.mean(answers.score(ctx, ctx.model("reward"), params, demonstrations)))


def fold_labelers(ctx: Context) -> list[set[str]]:
  """The labelers of each fold of the cross-validation; [] when it is off.

  Raises:
    ValueError: too few labelers are named, or nobody of a fold ranked a held-out prompt.
  """
  folds = ctx.config.rm.cross_validation_folds
  if not folds:
    return []
  named = [
    {record.labeler for record in ctx.records("comparisons", split) if record.labeler is not None}
    for split in ("train", "validation")
  ]
  labelers = sorted(named[0])
  result = [set(labelers[fold::folds]) for fold in range(folds)]
  if not all(outside & named[1] for outside in result):
    raise ValueError(
      f"rm.cross_validation_folds={folds} must leave each fold a labeler with held-out rankings, and the"
      f" comparisons name {len(labelers)} labelers; set it to 0 or add a 'labeler' to each row"
    )
  return result


def cross_validate(ctx: Context) -> list[dict]:
  """Trains on all but one fold of labelers, and judges on that fold and on the others' held-out prompts (sec 4.1)."""
  cfg = ctx.config.rm
  train_records, held_out = (ctx.records("comparisons", split) for split in ("train", "validation"))
  results = []
  for fold, outside in enumerate(fold_labelers(ctx)):
    inside = [r for r in train_records if r.labeler not in outside][: cfg.cross_validation_prompts]
    stage = f"rm/fold_{fold}"
    _, params = train(ctx, stage, inside, ctx.key(stage))
    results.append(
      {
        "heldout": judge(ctx, params, [r for r in held_out if r.labeler in outside])["accuracy"],
        "train": judge(ctx, params, [r for r in held_out if r.labeler not in outside])["accuracy"],
      }
    )
  return results


def run(ctx: Context, stage: str):
  """Trains `rm`, sets its bias and measures it on held-out prompts and on held-out labelers."""
  run_ = _stage_run(ctx, stage)
  if finished(run_):
    return
  num_steps, params = train(ctx, stage, ctx.records("comparisons", "train"), ctx.key(stage))
  result = {
    "fingerprint": run_.fingerprint,
    "step": num_steps,
    "demonstration_mean": demonstration_mean(ctx, params),
    "validation": judge(ctx, params, ctx.records("comparisons", "validation")),
  }
  if ctx.collects:
    result["heldout_labelers"] = judge(ctx, params, ctx.records("comparisons", "heldout"))
  if fold_labelers(ctx):
    result["cross_validation"] = cross_validate(ctx)
  checkpoint.write_done(run_.directory, result)
