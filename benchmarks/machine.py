"""Measures the two rates of this machine from which the benchmarks compute their lower bounds: FLOPs and reading."""

import statistics
import time

import jax
import jax.numpy as jnp

from instructjax.parallel import memory

# Bytes that Adam moves for each parameter: the parameter and its two moments in float32, each read and written.
UPDATE_BYTES = 24


def _seconds(function, *args, repeats: int) -> float:
  """The median seconds of a function, which is compiled first."""
  memory.keep_freed_memory()  # otherwise half of the time goes into faulting in the pages of each result
  program = jax.jit(function)
  program(*args).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    program(*args).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def product_flops(size: int = 2048) -> float:
  """FLOPs per second of a float32 product of two square matrices."""
  square = jnp.ones((size, size))
  return 2 * size**3 / _seconds(jnp.matmul, square, square, repeats=15)


def read_rate(columns: int = 65536) -> float:
  """Bytes per second that the product of a vector and a large matrix reads.

  Every entry of the matrix is used once, so that reading it takes all of the time.
  """
  matrix, vector = jnp.ones((2048, columns)), jnp.ones((1, 2048))
  return matrix.nbytes / _seconds(jnp.matmul, vector, matrix, repeats=9)
