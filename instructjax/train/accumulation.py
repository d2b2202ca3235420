"""Takes a batch in chunks of its rows (microbatches), so that the activations of one chunk at a time are in memory.

Called by supervised.py, by rl/ (rows, shared_rows and step) and by stages/rm.py. Imports no model and no config.

The result is that of the whole batch up to rounding. So nothing here is a mean of chunks' means: chunks differ in their
numbers of tokens. What a chunk gives is its share of the batch's loss, and shares add up. Only a metric named
`..._max` is a maximum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.parallel import constraints

Result = tuple[tuple[Array, dict[str, Array]], Params]  # ((loss, metrics), gradient)


def gradient(loss_fn: Callable, params: Params, batch: Any, num_chunks: int) -> Result:
  """Gradient of a loss that is a sum over rows.

  Args:
    loss_fn: (params, rows of the batch) -> (loss, metrics): these rows' shares of the batch's loss and metrics.
    params: of the network.
    batch: arrays with rows on dimension 0, which are taken in order.
    num_chunks: static; divides the rows. With 1, the batch is one chunk, without a loop.
  Returns:
    ((loss, metrics), gradient) of the whole batch.
  """
  one = jax.value_and_grad(loss_fn, has_aux=True)
  if num_chunks == 1:
    return one(params, batch)

  def add_chunk(so_far, chunk):
    return add(so_far, one(params, constraints.shard_rows(chunk))), None

  chunks = _split(batch, num_chunks)
  shapes = jax.eval_shape(loss_fn, params, jax.tree.map(lambda x: x[0], chunks))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  zero = (zeros, jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(add_chunk, zero, chunks)[0]


def mean_gradient(
  loss_fn: Callable, params: Params, batch: Any, num_chunks: int, count: Callable
) -> Result:
  """Gradient of a loss that is a mean.

  Args:
    loss_fn: (params, rows of the batch) -> (loss, metrics), means over what `count` counts in these rows.
    params, batch, num_chunks: as for `gradient`.
    count: see `share`.
  Returns:
    ((loss, metrics), gradient) of the whole batch.
  """
  return gradient(
    loss_fn if num_chunks == 1 else share(loss_fn, batch, count), params, batch, num_chunks
  )


def share(loss_fn: Callable, batch: Any, count: Callable) -> Callable:
  """Makes a loss that is a mean over some rows into these rows' share of the mean over the batch.

  Args:
    loss_fn: (params, rows) -> (loss, metrics), means.
    batch: all rows.
    count: rows -> how many things the means are over: {'loss': number}, with an entry for each metric that is a mean
      over other things than the loss.
  Returns:
    (params, rows) -> (loss, metrics), shares.
  """
  total = {name: jnp.maximum(number, 1) for name, number in count(batch).items()}

  def weighted(params, rows):
    loss, metrics = loss_fn(params, rows)
    shares = {name: number / total[name] for name, number in count(rows).items()}
    of = lambda name: shares.get(name, shares["loss"])
    metrics = {n: x if n.endswith("_max") else of(n) * x for n, x in metrics.items()}
    return shares["loss"] * loss, metrics

  return weighted


def add(so_far: Result, new: Result) -> Result:
  """Adds a chunk's ((loss, metrics), gradient) to that of the chunks before it."""
  (_, old), (_, latest) = so_far[0], new[0]
  (loss, metrics), grads = jax.tree.map(jnp.add, so_far, new)
  maxima = {
    name: jnp.maximum(old[name], latest[name]) for name in new[0][1] if name.endswith("_max")
  }
  return (loss, metrics | maxima), grads


def map_rows(function: Callable, batch: Any, num_chunks: int) -> Any:
  """A function of rows, computed chunk by chunk.

  Args:
    function: arrays [n, ...] -> arrays [n, ...].
    batch, num_chunks: as for `gradient`.
  Returns:
    Its arrays for all rows, in order.
  """
  if num_chunks == 1:
    return function(batch)
  done = jax.lax.map(
    lambda chunk: function(constraints.shard_rows(chunk)), _split(batch, num_chunks)
  )
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


def _split(batch: Any, num_chunks: int) -> Any:
  """[rows, ...] -> [chunks, rows of a chunk, ...]."""
  return jax.tree.map(lambda x: x.reshape(num_chunks, -1, *x.shape[1:]), batch)
