"""Further reward models: which are taken, what is told of the others, and their common zero."""

import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.stages import ensembles
from tests import micro, tiny

CONFIG = micro.config("ppo", {}, ppo__rewards=("ensemble:mean",), ppo__ensemble=("a/rm", "b"))
NETWORK = CONFIG.reward_model.network


def given(**changes):
  """A reward model of the run's shape and tokenizer, as `weights.locate` finds it."""
  values = dict(
    path="a/rm", head="scalar", item="params", network=NETWORK, kind="stage",
    settings={"tokenizer": "ours"}, tokenizer=types.SimpleNamespace(fingerprint="ours"),
  )  # fmt: skip
  return types.SimpleNamespace(**values | changes)


def opened(*found):
  by_path = dict(zip(CONFIG.ppo.ensemble, found, strict=True))
  with mock.patch.object(ensembles.weights, "locate", by_path.__getitem__):
    return ensembles.open_all(CONFIG, CONFIG.ppo)


def told(function, *arguments):
  with pytest.raises(UserError) as error:
    function(*arguments)
  return str(error.value)


def test_reward_models_of_the_runs_shape_are_taken():
  other_start = dataclasses.replace(NETWORK, init_std=0.7)
  pair = given(), given(network=other_start)
  assert opened(*pair) == [*pair]
  assert ensembles.open_all(CONFIG, dataclasses.replace(CONFIG.ppo, ensemble=())) == []


def test_home_folders_are_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  asked = []
  monkeypatch.setattr(ensembles.weights, "locate", lambda path: asked.append(path) or given())
  cfg = dataclasses.replace(CONFIG.ppo, ensemble=("~/b/rm", "hf://org/name"))
  ensembles.open_all(CONFIG, cfg)
  assert asked == ["/home/me/b/rm", "hf://org/name"]


def test_what_is_no_reward_model_of_this_shape_is_refused():
  where = "config.ppo.ensemble[1]='b' "
  for changes in (dict(head="lm"), dict(item="value_params")):
    assert told(opened, given(), given(**changes)).startswith(where + "must be a reward model")
  wide = dataclasses.replace(NETWORK, d_model=32, num_layers=2)
  line = told(opened, given(), given(network=wide))
  assert line.startswith(
    f"{where}has num_layers=2, d_model=32, and config.reward_model has num_layers=1, d_model=16: all"
  )

  def nothing(path):
    raise UserError(f"{path} is not there")

  with mock.patch.object(ensembles.weights, "locate", nothing):
    line = told(ensembles.open_all, CONFIG, CONFIG.ppo)
  assert line == "config.ppo.ensemble[0]='a/rm': a/rm is not there"


@pytest.mark.parametrize(
  "changes",
  [
    dict(settings={"tokenizer": "theirs"}),
    dict(kind="hf", tokenizer=types.SimpleNamespace(fingerprint="theirs")),
  ],
)
def test_another_tokenizer_is_refused(changes):
  tokenizer = types.SimpleNamespace(fingerprint="ours", path="run/tokenizer.model")
  ensembles.require_tokenizer([given(), given(kind="hf")], tokenizer)
  line = told(ensembles.require_tokenizer, [given(), given(path="b", **changes)], tokenizer)
  assert line.startswith("config.ppo.ensemble[1]='b' has another tokenizer than the run")
  assert "run/tokenizer.model" in line


@pytest.mark.parametrize("demonstrations", ["jsonl:d", ""])
def test_members_are_stacked_with_demonstrations_at_0(
  random_params, monkeypatch, capsys, demonstrations
):
  model = tiny.make_model(tiny.NETWORK, 23, "scalar")
  members = [random_params(model, seed) for seed in (1, 2)]
  ctx = types.SimpleNamespace(
    mesh=ensembles.sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]),
    model=lambda role: model.clone(adapter=CONFIG.adapter),
    config=micro.config("ppo", {}, data__demonstrations=demonstrations),
  )
  means = iter((0.75, -2.0))
  monkeypatch.setattr(ensembles.answers, "demonstration_mean", lambda *a: next(means))
  monkeypatch.setattr(ensembles, "_as_reward_model", lambda ctx, one: ctx)
  # Whole networks, also in a run that trains adapters.
  load = lambda mesh, model, params: params if model.adapter is None else pytest.fail()
  found = [
    given(path=f"run{i}", load=functools.partial(load, params=params))
    for i, params in enumerate(members)
  ]
  stacked = ensembles.load(ctx, "ppo", found)
  bias = jnp.stack([member["head"]["bias"] for member in members])
  shift = np.array([0.75, -2.0]) if demonstrations else np.zeros(2)
  np.testing.assert_allclose(
    stacked["head"]["bias"], bias - shift.reshape(2, *[1] * (bias.ndim - 1))
  )
  np.testing.assert_array_equal(
    stacked["embedding"]["position_TD"][1], members[1]["embedding"]["position_TD"]
  )
  printed = capsys.readouterr().out
  assert "ppo: ensemble member run1: " in printed
  assert ("demonstrations score -2, which becomes 0" in printed) == bool(demonstrations)
  assert ensembles.load(ctx, "ppo", []) is None
