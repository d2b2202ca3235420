"""What this machine can do at most, measured: the two rates that the benchmarks' bounds are made of."""

import statistics
import time

import jax
import jax.numpy as jnp

from instructjax.parallel import memory

# What Adam moves for a parameter: it and its two moments in float32, each read and written.
UPDATE_BYTES = 24


def _seconds(function, *args, repeats: int) -> float:
  """The median, of a function that is compiled first."""
  memory.keep_freed_memory()  # or each result's pages are faulted in, half of the time
  program = jax.jit(function)
  program(*args).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    program(*args).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def product_flops(size: int = 2048) -> float:
  """FLOPs a second of a large float32 product."""
  square = jnp.ones((size, size))
  return 2 * size**3 / _seconds(jnp.matmul, square, square, repeats=15)


def read_rate(columns: int = 65536) -> float:
  """Bytes a second that the product of a vector and a matrix of 2048 rows reads."""
  matrix, vector = jnp.ones((2048, columns)), jnp.ones((1, 2048))
  return matrix.nbytes / _seconds(jnp.matmul, vector, matrix, repeats=9)
