"""Freed memory is kept inside a stage and given back between two."""

import subprocess
import sys

import jax
import pytest

from instructjax.parallel import memory

_PROGRAM = """
import ctypes, resource
from instructjax.parallel import memory

def resident():
  return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

assert memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(2**24) for _ in range(16)]
for block in blocks:
  ctypes.memset(ctypes.c_void_p(block), 1, 2**24)
libc.free(blocks[0])  # a hole below what is still in use, as a program that is done leaves
for block in blocks[2:]:
  libc.free(block)
kept = resident()
memory.release_freed_memory()
print(kept, resident())
"""


def test_only_a_large_program_s_compilation_gives_memory_back(monkeypatch):
  released = []
  monkeypatch.setattr(memory, "release_freed_memory", lambda: released.append(1))
  listener = memory.release_after_compiling
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    jax.jit(lambda x: x * 3.0 + 0.25)(1.0)  # compiled in no time
    assert not released
    monkeypatch.setattr(memory, "LARGE_COMPILATION", 0.0)
    jax.jit(lambda x: x * 5.0 + 0.25)(1.0)
    assert released
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_freed_memory_is_kept_until_it_is_released():
  """256 MiB in blocks of 16, all freed but one."""
  output = subprocess.run(
    [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
  ).stdout
  kept, left = map(float, output.split())
  assert kept > 256
  assert kept - left > 224


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_an_export_gives_large_buffers_back_at_once():
  """The same blocks, and what an export sets before it takes its own."""
  program = _PROGRAM.replace("libc = ", "assert memory.return_freed_memory()\nlibc = ", 1)
  output = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  kept, _ = map(float, output.stdout.split())
  assert kept < 128
