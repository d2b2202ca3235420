"""Every test of ops/ runs under strict dtype promotion: an int that meets a float array raises."""

import json
import pathlib

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture(scope="session")
def published() -> dict:
  """Numbers printed in "The N Implementation Details of RLHF with PPO"."""
  path = pathlib.Path(__file__).parent.parent / "golden" / "n_implementation_details.json"
  return json.loads(path.read_text())
