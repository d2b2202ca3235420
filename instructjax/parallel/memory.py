"""Sets up glibc's allocator for XLA on CPU.

commands/cli.py calls `keep_freed_memory` before jax is imported, and export takes it back. Between stages, the
pipeline gives back to the kernel what was kept inside them. Imports nothing of the project.
"""

import ctypes
import gc
import sys

# Numbers of the parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8

_COMPILED = "/jax/core/compile/backend_compile_duration"  # name of the event in jax.monitoring
LARGE_COMPILATION = 1.0  # seconds from which on a compilation is worth giving its memory back


def keep_freed_memory() -> bool:
  """Makes malloc reuse the pages of freed buffers instead of giving them back to the kernel.

  XLA's CPU client allocates and frees every output and temporary of every step. By default glibc maps each large one
  anew, and faulting in its fresh pages takes about 30% of a small training step's CPU time (`python -m
  benchmarks.malloc` measures it). Does nothing if the C library is not glibc.

  Returns:
    Whether glibc accepted the settings.
  """
  # No mmap, so that large buffers come from the heap, which is kept. One arena, so that all threads reuse one heap. The
  # heap is never trimmed (-1), since a step may free more than any threshold that fits an int. It grows by 256 MiB.
  return _set({_MMAP_MAX: 0, _ARENA_MAX: 1, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**28})


def return_freed_memory() -> bool:
  """Makes malloc give large freed buffers back to the kernel at once, the opposite of `keep_freed_memory`.

  For an export, which takes one large buffer after another, each of another size: those that are kept would be in the
  way of the next.

  Returns:
    Whether glibc accepted the settings.
  """
  size = 2**20
  sizes = {_MMAP_THRESHOLD: size, _TRIM_THRESHOLD: size, _TOP_PAD: 0}
  return _set({_MMAP_MAX: 2**16, _ARENA_MAX: 1, **sizes})


def _set(settings: dict[int, int]) -> bool:
  """Whether glibc accepted settings of mallopt; False if the C library is another."""
  if sys.platform != "linux":
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])


def release_after_compiling(event: str, duration_secs: float, **_: str | int):
  """Listener of jax.monitoring that gives back the memory of a large compilation before the program runs."""
  if event == _COMPILED and duration_secs > LARGE_COMPILATION:
    release_freed_memory()


def release_freed_memory():
  """Gives freed pages back to the kernel.

  Call it between programs: the pieces that one leaves behind are of little use to the next. Without it, a
  process holds 19 GB after two stages of a 135M model that need 9 GB each.
  """
  gc.collect()  # frees arrays that only reference cycles still hold
  if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
      libc.malloc_trim(0)
