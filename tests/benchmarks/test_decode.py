"""benchmarks.decode: what it says of runs, and that its programs do the work that it says."""

import jax
import numpy as np
import pytest

from benchmarks import decode
from instructjax import models
from instructjax.core.errors import UserError
from tests import tiny


def programs(**theirs):
  """What `turns.measure` might have found."""
  ours = {"batch_1_step_ms": 12.0, "batch_16_step_ms": 30.0, "batch_1_draw_ms": 0.5}
  ours |= {"description": {"parameters": 1_000_000}, "cpu_s": {"median": 3.0}}
  peer = {"batch_1_step_ms": 24.0, "batch_16_step_ms": 40.0, "cpu_s": {"median": 3.0}}
  return {
    "instructjax": ours,
    "transformers": peer | {"description": {"parameters": 1_000_000}} | theirs,
  }


def test_floor_and_ratios_by_hand():
  ours, theirs, ratios = decode.lines(programs(), rate=2e9, peer="transformers")
  assert ours["floor_ms"] == theirs["floor_ms"] == 2.0  # 4e6 bytes at 2e9 a second
  assert ours["read_gb_s"] == 2.0
  assert (ours["program"], ours["batch_1_draw_ms"]) == ("instructjax", 0.5)
  assert ratios == {"over_transformers": {"batch_1_step_ms": 0.5, "batch_16_step_ms": 0.75}}


def test_another_model_is_no_peer():
  found = programs(description={"parameters": 999})
  with pytest.raises(UserError, match="999 parameters, where ours are 1000000"):
    decode.lines(found, rate=1e9, peer="transformers")


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setattr(decode, "PEERS", tmp_path)
  with pytest.raises(UserError, match="setup.sh trl"):
    decode.peer_command(None)


def test_the_model_is_smollm2():
  config = decode.smollm2()
  model = models.model_on(None, config.model.network, config.execution, decode.VOCAB, "lm")
  sizes = [x.size for x in jax.tree.leaves(models.param_shapes(model))]
  assert sum(sizes) == 134_515_008
  assert model.execution.dtype == "float32"


@pytest.mark.parametrize("batch", [1, 3])
def test_every_row_gets_all_its_tokens(tiny_config, random_params, batch):
  model = tiny.make_model(tiny_config, 19, "lm", max_length=64)
  params = random_params(model)
  rollout = decode.compile_rollout(model, params, batch, num_tokens=5)()
  assert np.all(rollout.is_response_BR) and rollout.is_response_BR.shape == (batch, 5)
  assert int(rollout.num_steps) == 5


def test_every_draw_is_made():
  ends = [np.asarray(decode.compile_draws(2, 300, draws)()) for draws in (0, 1, 2)]
  for before, after in zip(ends, ends[1:]):
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert np.all(before[:, 0] != after[:, 0])  # the log-probability of the newest draw
