"""Networks that read the episodes of episodes.py, once a module."""

import pytest

from tests.rl import episodes


@pytest.fixture(scope="module")
def nets(tiny_config):
  return episodes.make_nets(tiny_config)


@pytest.fixture(scope="module")
def weights(nets, random_params):
  return episodes.make_weights(nets, random_params)
