"""Every spelling of rotary settings: the frequencies of transformers or llama.cpp, or a refusal that names the key."""

import json
import math
import pathlib

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys
from instructjax.models import positions
from instructjax.models.interop import hf_config, rotary

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden/rotary.json").read_text())["cases"]
# Spellings that transformers computes and we refuse -> what the message must name. All others are equal, or are refused
# by transformers as well.
REFUSED = {
  "theta in both places, different": "rope_parameters: rope_theta=500.0 contradicts rope_theta=700",
  "theta only in the block that is replaced": "rope_scaling and rope_parameters contradict",
  "factor without a type": "rope_scaling lacks 'rope_type', and has factor=4.0",
  "factor without a type, version 5": "rope_parameters lacks 'rope_type', and has factor=4.0",
  "linear, types that differ": "type='llama3' contradicts rope_type='linear'",
  "default, old type linear": "type='linear' contradicts rope_type='default'",
  "linear, factor below 1": "rope_scaling.factor=0.5 must be >= 1",
  "both, other factors": "rope_scaling and rope_parameters contradict",
  "default scaling beside parameters": "rope_scaling and rope_parameters contradict",
  "llama3 and linear": "rope_scaling and rope_parameters contradict",
  "llama3, original lengths differ": "original_max_position_embeddings=32 contradicts",
  "llama3, low above high": "low_freq_factor=8.0 must be > 0 and below",
  "dynamic, original length": "original_max_position_embeddings=32 must be",
  "yarn, attention_factor 0": "attention_factor=0.0 must be above 0",
  "yarn, betas reversed": "low_freq_factor=8.0 must be > 0 and below high_freq_factor=1.0",
  "yarn, not truncated": "truncate=False is not supported, only True",
  "yarn, original lengths differ": "original_max_position_embeddings=32 contradicts",
  "longrope": "rope_type='longrope' is not supported",
  "proportional": "rope_type='proportional' is not supported",
  "partial at the top": "partial_rotary_factor=0.5 is not supported",
  "partial at the top beside linear": "partial_rotary_factor=0.5 is not supported",
  "partial inside": "rope_parameters: partial_rotary_factor=0.5 is not supported",
  "by kind of layer": "rope_parameters: full_attention=",
  "by kind of layer, one": "rope_parameters: full_attention=",
  "rotary_pct": "rotary_pct=0.25 is not read by this architecture",
  "rotary_dim": "rotary_dim=4 is not read",
  "rotary_emb_base": "rotary_emb_base=500 is not read",
  "rope_local_base_freq": "rope_local_base_freq=500.0 is not read",
  "rope_type at the top": "rope_type='linear' is not read",
  "rope_scaling_factor": "rope_scaling_factor=4.0 is not read",
  "no_rope_layers": "no_rope_layers=[1, 0] is not read",
}


def network(raw: dict):
  return hf_config.model_config(raw, "config.json").cfg


def frequencies(raw: dict) -> np.ndarray:
  return np.asarray(positions.rotary_frequencies(network(raw)))


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_are_those_of_transformers(name):
  case, spelling = GOLDEN[name], name.partition(": ")[2]
  if spelling in REFUSED or "error" in case:
    with pytest.raises(UserError) as error:
      frequencies(case["config"])
    assert REFUSED.get(spelling, "config.json: ") in str(error.value)
    assert "\n" not in str(error.value)
    return
  np.testing.assert_allclose(frequencies(case["config"]), case["inv_freq"], rtol=2e-6)
  cfg = network(case["config"])
  assert positions.attention_factor(cfg) == pytest.approx(case["factor"], rel=1e-6)
  assert case["factor"] == 1 or cfg.rope_scaling.kind == "yarn"
  written = hf_config.to_hf_config(cfg, 17, "lm")
  assert network(written).rope_scaling == cfg.rope_scaling


def test_what_is_refused_is_computed_by_transformers():
  """Otherwise an entry of REFUSED would say nothing."""
  assert {f"llama: {name}" for name in REFUSED} <= {
    n for n, c in GOLDEN.items() if "error" not in c
  }


def test_live():
  """The recorded numbers against the transformers that is installed, if there is one."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from tests.golden import rotary_by_transformers

  for name in ("llama: llama3", "llama: yarn, betas", "qwen2: both equal"):
    now = rotary_by_transformers.computed(GOLDEN[name]["config"])
    np.testing.assert_allclose(now["inv_freq"], GOLDEN[name]["inv_freq"], rtol=1e-6)


def test_keys_that_a_type_has_no_use_for_are_named(monkeypatch):
  lines = []
  monkeypatch.setattr(rotary.logging, "warning", lambda text, *args: lines.append(text % args))
  frequencies(GOLDEN["llama: linear, mscale"]["config"])
  assert lines == [
    "config.json: rope_scaling: keys that rope_type linear has no use for, as in transformers: mscale"
  ]


@pytest.mark.parametrize(
  "value", [[], [1], 0, 1.5, True, "linear", {"a": {"b": 1}}, {"rope_type": []}, {"factor": {}}]
)
@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
def test_values_of_every_type(block, value):
  with pytest.raises(UserError, match=f"config.json: {block}"):
    rotary.from_config(Keys({block: value, "max_position_embeddings": 8}, "config.json"), "llama")


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [[], {}, "x", True, math.inf, math.nan, 10**400, -1])
def test_numbers_of_every_kind(name, value):
  with pytest.raises(UserError, match=name):
    rotary.from_config(Keys({name: value, "max_position_embeddings": 8}, "config.json"), "llama")


def test_switches_that_are_off_pass():
  raw = GOLDEN["llama: nothing"]["config"]
  off = {"rotary_pct": 1.0, "use_mrope": False, "rope_interleaved": False, "rotary_dim": None}
  np.testing.assert_array_equal(frequencies(raw | off), frequencies(raw))
  for name, on in (("use_mrope", True), ("rope_interleaved", True), ("use_rope", False)):
    with pytest.raises(UserError, match=f"config.json: {name}={on} is not read"):
      frequencies(raw | {name: on})


def test_learned_positions_have_no_rotary_keys():
  raw = {"model_type": "gpt2", "vocab_size": 5, "rope_scaling": {"type": "linear", "factor": 2.0}}
  with pytest.raises(UserError, match="rope_scaling=.* this architecture has learned positions"):
    hf_config.model_config(raw, "config.json")


@pytest.mark.parametrize(
  "changes",
  [
    {"beta_slow": 1e-320, "beta_fast": 1e308},
    {"beta_slow": 1e300, "beta_fast": 1e308},
    {"beta_slow": 1e-320, "beta_fast": 1e-310, "rope_theta": 1 + 1e-15},
    {"factor": 1e308},
  ],
)
def test_yarn_of_any_size_has_frequencies(changes):
  block = GOLDEN["llama: yarn"]["config"]["rope_scaling"] | changes
  found = frequencies(GOLDEN["llama: nothing"]["config"] | {"rope_scaling": block})
  assert np.isfinite(found).all()


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"factor": 1e300, "mscale": 1.7e308, "mscale_all_dim": 1.0},
      "mscale_all_dim=1.0 must leave attention a factor",
    ),
    ({"mscale": -99.0, "mscale_all_dim": 1.0}, "mscale_all_dim=1.0 must leave attention a factor"),
    ({"beta_fast": -1}, "must be > 0 and below high_freq_factor=-1"),
    ({"rope_theta": 0.5}, "rope_base=0.5 must be above 1"),
  ],
)
def test_yarn_out_of_range(changes, message):
  block = GOLDEN["llama: yarn"]["config"]["rope_scaling"] | changes
  with pytest.raises(UserError, match=message):
    frequencies(GOLDEN["llama: nothing"]["config"] | {"rope_scaling": block})
