"""Test-wide settings: eight fake CPU devices, strict rank promotion, real data found by an environment variable."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax  # noqa: E402  (the flags above must be set before the first import)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def real_data_dir() -> pathlib.Path:
  """Folder of the real data; tests that need it are marked `real_data` and skip where it is absent."""
  path = pathlib.Path(os.environ.get("INSTRUCTJAX_DATA_DIR", "../shared/data"))
  if not path.is_dir():
    pytest.skip(f"real data not found: INSTRUCTJAX_DATA_DIR={path} is not a folder")
  return path
