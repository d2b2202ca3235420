"""Variables of the shell do not change a run's numbers."""

import os
import subprocess
import sys

from instructjax.core import environment

CHANGING = {
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
  "JAX_ENABLE_X64": "1",
  "JAX_THREEFRY_PARTITIONABLE": "0",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
  "JAX_DISABLE_JIT": "1",
  "JAX_RANDOM_SEED_OFFSET": "7",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "JAX_DEBUG_NANS": "1",
  "JAX_SOMETHING_NEW": "1",
  "JAX_PLATFORMS_OF_LATER": "1",  # begins like one that is kept
}
KEPT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUM_CPU_DEVICES": "2",
  "JAX_CUDA_VISIBLE_DEVICES": "0",
  "JAX_COORDINATOR_ADDRESS": "h:1",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "0",
  "JAX_LOG_COMPILES": "0",
  "JAX_COMPILATION_CACHE_DIR": "x",
  "XLA_FLAGS": "--xla_cpu_enable_fast_math=false",
  "PATH": "/bin",
}
# What the commands do first; then numbers that each of the variables above would change.
PROGRAM = """
from instructjax.commands import cli
def main(arguments):
  import jax, jax.numpy as jnp
  key = jax.random.key(0)
  print(key.dtype, jax.random.normal(key, (3,)), jnp.arange(3).dtype, jnp.arange(3) * 0.1, jax.jit(jnp.sum)(jnp.eye(2)))
  print(jax.random.split(key, 2), jnp.ones((2, 2)) + jnp.ones(2), jnp.zeros(1) / 0.0)
  print(jnp.full((4, 4), 1 / 3) @ jnp.full((4, 4), 1 / 3))
cli.run(main, interrupted="")
"""


def test_only_variables_that_change_numbers_are_removed(capsys):
  environ = CHANGING | KEPT
  environment.fix(environ)
  assert environ == KEPT | {"MPLBACKEND": "agg"}
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("JAX_DEBUG_NANS, JAX_DEFAULT_MATMUL_PRECISION, ")
  assert line.endswith(
    "JAX_THREEFRY_PARTITIONABLE have no effect: the config alone decides a run's numbers"
  )
  environment.fix(environ)
  assert capsys.readouterr().err == ""


def test_a_notebooks_variable_for_matplotlib_does_not_reach_the_report():
  """A kernel's names a module that another environment lacks; matplotlib then fails where it is imported."""
  program = "import matplotlib; print(matplotlib.get_backend())"
  command = f"from instructjax.core import environment; environment.fix(); {program}"
  environ = os.environ | {"MPLBACKEND": "module://a_module_that_is_not_there"}
  done = subprocess.run(
    [sys.executable, "-c", command], env=environ, capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout.strip()) == (0, "agg"), done.stderr


def test_a_shell_with_other_settings_gives_the_same_numbers():
  shell = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  shell["JAX_PLATFORMS"] = "cpu"
  plain, other = (
    subprocess.run(
      [sys.executable, "-c", PROGRAM], env=shell | more, capture_output=True, text=True, timeout=120
    )
    for more in ({}, CHANGING)
  )
  assert (plain.returncode, plain.stderr) == (0, "") and "key<fry>" in plain.stdout
  assert (other.returncode, other.stdout) == (0, plain.stdout), other.stderr
  assert other.stderr.count("\n") == 1 and "JAX_ENABLE_X64" in other.stderr
