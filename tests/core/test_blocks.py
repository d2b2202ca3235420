"""Dataclasses from nested dicts: unknown and missing fields and wrong types get a telling message."""

import pytest

from instructjax.core.config import from_config_dict
from tests.core.plain import changed, load


def test_unknown_field_suggests_the_near_one():
  with pytest.raises(
    ValueError,
    match=r"config\.model\.dmodel is not a config field; did you mean config\.model\.d_model\?",
  ):
    from_config_dict(changed(model__dmodel=64))


def test_unknown_field_without_a_near_one_lists_the_known():
  with pytest.raises(
    ValueError, match=r"config\.log\.zzz is not a config field; known fields: every_steps, samples"
  ):
    from_config_dict(changed(log__zzz=1))


def test_missing_field():
  plain = load().to_dict()
  del plain["ppo"]["beta"]
  with pytest.raises(ValueError, match=r"config\.ppo lacks beta"):
    from_config_dict(plain)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(seed=1.5), "config.seed=1.5 must be of type int, got float"),
    (dict(seed=True), "config.seed=True must be of type int, got bool"),
    (dict(ppo__beta="0.02"), "config.ppo.beta='0.02' must be of type float, got str"),
    (dict(ppo__beta=False), "config.ppo.beta=False must be of type float, got bool"),
    (dict(ppo__value_clip="off"), "config.ppo.value_clip='off' must be of type float, got str"),
    (dict(ppo__whiten_rewards=1), "config.ppo.whiten_rewards=1 must be of type bool, got int"),
    (
      dict(model__norm="batchnorm"),
      "config.model.norm='batchnorm' must be one of 'layernorm', 'rmsnorm', 'rmsnorm_1p'",
    ),
    (
      dict(execution__attention="flash"),
      "config.execution.attention='flash' must be one of 'auto', 'plain', 'splash', 'cudnn'",
    ),
    (dict(ppo__policy_optim=1e-3), "config.ppo.policy_optim=0.001 must be a block of fields"),
    (dict(evaluate__compare="ppo"), "config.evaluate.compare='ppo' must be a tuple of str"),
    (
      dict(evaluate__compare=("ppo", 1)),
      "config.evaluate.compare[1]=1 must be of type str, got int",
    ),
  ],
)
def test_wrong_type(values, message):
  with pytest.raises(ValueError) as error:
    from_config_dict(changed(**values))
  assert str(error.value) == message


def test_int_is_taken_for_float_and_none_for_optional():
  config = from_config_dict(changed(ppo__beta=0, ppo__value_clip=None, evaluate__compare=["ppo"]))
  assert isinstance(config.ppo.beta, float)
  assert config.ppo.value_clip is None
  assert config.evaluate.compare == ("ppo",)
