"""Test-wide settings: workers, eight fake CPU devices, strict rank promotion, real data by an environment variable."""

import dataclasses
import functools
import os
import pathlib

from tests import quick

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 " + quick.FLAGS
).strip()

# The flags above must be set before JAX is first imported.
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig, NetworkConfig, OptimConfig, PPOConfig
from instructjax.parallel import sharding
from tests import tiny

jax.config.update("jax_numpy_rank_promotion", "raise")
# No compilation cache shared by all tests. With a warm one, tests/rl/test_step_program.py was aborted in two of three
# runs (JAX 0.10.2, eight CPU devices; why is not known), and within a session few programs are compiled twice.

# Files that take longest, longest first: started last, one would keep its worker busy while the others idle.
SLOW = (
  "launch/test_local_pod.py",
  "stages/test_pipeline.py",
  "rl/test_step_program.py",
  "models/test_transformer.py",
  "launch/test_colab.py",
  "parallel/test_distributed.py",
)
# More than four would each compile much the same programs, in over a gigabyte of memory each.
MOST_WORKERS = 4
FEW_FILES = 10  # a worker takes seconds to start: as long as few files take


def pytest_xdist_auto_num_workers(config) -> int:
  """Workers of `--numprocesses=auto`, which setup.cfg asks for; none for a few files."""
  files = set()
  for argument in config.args:
    path = pathlib.Path(argument.partition("::")[0])
    files |= set(path.rglob("test_*.py")) if path.is_dir() else {path}
  workers = min(os.cpu_count() or 1, MOST_WORKERS)
  return workers if len(files) > FEW_FILES and workers > 1 else 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
  """Workers get the slow files first; without workers the order stays as it is written."""
  if not hasattr(config, "workerinput"):
    return
  tests = pathlib.Path(__file__).parent
  rank = {tests / name: number for number, name in enumerate(SLOW)}
  items.sort(key=lambda item: rank.get(item.path, len(SLOW)))  # stable


@pytest.fixture(scope="session")
def real_data_dir() -> pathlib.Path:
  """Folder of the real data; tests that need it are marked `real_data` and skip where it is absent."""
  path = pathlib.Path(os.environ.get("INSTRUCTJAX_DATA_DIR", "../shared/data"))
  if not path.is_dir():
    pytest.skip(f"real data not found: INSTRUCTJAX_DATA_DIR={path} is not a folder")
  return path


@pytest.fixture(scope="session")
def quick_jit():
  """jax.jit that compiles a tiny program in a third of the time."""
  return functools.partial(jax.jit, compiler_options=quick.OPTIONS)


@pytest.fixture(scope="session")
def tiny_config() -> NetworkConfig:
  return tiny.NETWORK


@pytest.fixture(scope="session")
def adam_config() -> OptimConfig:
  """Adam whose eps keeps rounding noise in near-zero gradients from becoming whole steps."""
  return dataclasses.replace(
    tiny.CONFIG.ppo.value_optim,
    learning_rate=1e-2,
    warmup_steps=0,
    warmup_start=0.0,
    end_fraction=1.0,
    eps=1e-3,
    clip_norm=None,
  )


@pytest.fixture(scope="session")
def ppo_config(adam_config) -> PPOConfig:
  return dataclasses.replace(
    tiny.CONFIG.ppo,
    num_iterations=3,
    batch_size=16,
    num_minibatches=2,
    microbatches=1,
    score_microbatches=1,
    num_epochs=2,
    packed_rows=0,
    temperature=0.7,
    samples_per_prompt=1,
    advantage="gae",
    behaviour_logprob="rollout",
    beta=0.02,
    kl_controller="fixed",
    kl_target=6.0,
    kl_horizon=100,
    gamma=0.0,
    ptx_rows=8,
    ptx_microbatches=8,
    ptx_length=8,
    ptx_reduction="mean",
    discount=1.0,
    gae_lambda=0.95,
    clip=0.2,
    value_clip=0.2,
    whiten_advantages=True,
    whiten_rewards=False,
    missing_eos="as_is",
    missing_eos_score=-1.5,
    ema_decay=0.9,
    max_kl=0.0,
    policy_optim=adam_config,
    value_optim=adam_config,
  )


@pytest.fixture(scope="session")
def random_params():
  """random_params(model, seed=0): float32 weights, all of them random, so that none is idle."""

  def one(model: models.Model, seed: int = 0):
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
    return jax.tree.map(noise, models.param_shapes(model))

  return one


MESHES = [(1, 8, 1, 1), (1, 1, 4, 2), (1, 2, 2, 2), (2, 1, 2, 2)]


@pytest.fixture(scope="session", params=MESHES, ids=str)
def mesh(request) -> jax.sharding.Mesh:
  """Eight devices as (slice, data, fsdp, tensor), four ways."""
  return sharding.make_mesh(MeshConfig(*request.param))
