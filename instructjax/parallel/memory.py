"""glibc's allocator set up for XLA on CPU. Called by cli before jax is imported; imports nothing of the project.

`pipeline` gives back between stages what is kept inside them.
"""

import ctypes
import gc
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8

_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax.monitoring's name
LARGE_COMPILATION = 1.0  # seconds


def keep_freed_memory() -> bool:
  """Makes malloc reuse the pages of freed buffers instead of giving them back to the kernel.

  XLA's CPU client mallocs and frees every output and temporary of every step. By default glibc maps
  each large one anew, and faulting the fresh pages in takes about 30% of a small training step's CPU
  time (`python -m benchmarks.malloc` measures it). Does nothing where the C library is not glibc.

  Returns:
    Whether the settings were taken.
  """
  if sys.platform != "linux":
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  # -1 never trims: a step may free more than any threshold that fits an int.
  settings = {_MMAP_MAX: 0, _ARENA_MAX: 1, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28}
  return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])


def release_after_compiling(event: str, duration_secs: float, **_: str | int):
  """Listener of jax.monitoring: gives back what compiling a large program took, before it runs."""
  if event == _COMPILED and duration_secs > LARGE_COMPILATION:
    release_freed_memory()


def release_freed_memory():
  """Gives freed pages back to the kernel: what one program kept in pieces is of little use to the next.

  Without it, the stages of a 135M model that need 9 GB each hold 19 GB after two of them.
  """
  gc.collect()  # first, what is only waiting to be freed
  if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
      libc.malloc_trim(0)
