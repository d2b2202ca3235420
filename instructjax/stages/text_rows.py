"""Rows of pretraining text: bases are trained on them, SFT and PPO-ptx mix them in, held-out ones measure loss."""

import itertools

from instructjax.data import batching
from instructjax.data.sources import Split
from instructjax.stages.context import Context


def document_batches(
  ctx: Context,
  split: Split,
  *,
  length: int,
  batch_size: int,
  seed: int,
  places: batching.Places | None = None,
) -> batching.Batches:
  """Packed rows of pretraining text; `places` in a global batch, where they are not its only rows."""
  return batching.lm_batches(
    ctx.data.document_tokens(split),
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
