"""Packed rows of pretraining text: bases train on them, SFT and PPO-ptx mix them in, and held-out rows measure loss."""

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
  """Batches of packed rows of pretraining text.

  Args:
    ctx: the run.
    split: 'train' or 'validation'.
    length: tokens in a row.
    batch_size: rows in a global batch.
    seed: orders the rows.
    places: the rows that this process draws; None for its share of the batch. To be given if these rows are only a part
      of a larger batch.
  Raises:
    UserError: the documents cannot be read, or the batch does not divide over the mesh.
  """
  return batching.packed_batches(
    ctx.data.document_rows(split, length),
    batch_size=batch_size,
    seed=seed,
    places=ctx.own_rows(batch_size) if places is None else places,
  )


def validation_rows(ctx: Context, length: int) -> list:
  """Held-out rows of pretraining text, the same for every stage, so that their pretraining losses compare.

  Raises:
    UserError: the documents cannot be read.
  """
  batch_size = ctx.config.pretrain.batch_size
  batches = document_batches(ctx, "validation", length=length, batch_size=batch_size, seed=0)
  return list(
    itertools.islice(batches, min(ctx.config.evaluate.pretrain_batches, batches.steps_per_epoch))
  )
