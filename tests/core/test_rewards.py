"""The spelling of a list of rewards."""

import pytest

from instructjax.core import rewards
from instructjax.core.errors import UserError


def parse(*spellings):
  return rewards.parse(spellings, "config.ppo.rewards")


def test_what_a_list_says():
  found = parse(
    "rm", "0.5*python:my.mod:fn", "-1e-2 * length:20-200", ".3*format:a*|2*b", "0*length:9-"
  )
  assert [one.kind for one in found] == ["rm", "python", "length", "format", "length"]
  assert [one.weight for one in found] == [1, 0.5, -0.01, 0.3, 0]
  assert [one.argument for one in found] == ["", "my.mod:fn", "20-200", "a*|2*b", "9-"]
  assert [one.name for one in found] == ["rm", "fn", "length", "format", "length_2"]
  assert [one.on_host for one in found] == [False, True, False, True, False]
  assert rewards.on_host(found) == (found[1], found[3])
  (other,) = parse("2*model:runs/b:c/rm")
  assert (other.name, other.argument, other.on_host) == ("model", "runs/b:c/rm", True)
  assert found[1].spelling == "python:my.mod:fn"


def test_what_is_left_for_the_devices():
  assert rewards.on_devices(("rm", "2*python:a:b", "-1*length:-3")) == ("rm", "length:-3")
  assert rewards.on_devices(("python:a:b",)) == ("rm",)
  # A list of its own, which has some weight that is not 0.
  assert parse(*rewards.on_devices(("0*rm", "python:a:b")))


@pytest.mark.parametrize(
  ("argument", "limits"), [("3-7", (3, 7)), ("-7", (0, 7)), ("3-", (3, 10**8)), ("4-4", (4, 4))]
)
def test_the_ends_of_a_length_rule(argument, limits):
  assert parse(f"length:{argument}")[0].lengths == limits


def test_functions_of_one_name_and_of_a_rules_name_are_numbered():
  names = [one.name for one in parse("python:a:fn", "python:b:fn", "python:c:rm", "python:d:total")]
  assert names == ["fn", "fn_2", "rm_2", "total_2"]
  assert [one.name for one in parse("python:a:K.length", "length:-3")] == ["length_2", "length"]


def test_only_the_bare_reward_model_is_the_papers():
  assert rewards.is_reward_model_alone(parse("rm")) and rewards.is_reward_model_alone(parse("1*rm"))
  for others in (("2*rm",), ("rm", "length:-3"), ("length:-3",)):
    assert not rewards.is_reward_model_alone(parse(*others))


@pytest.mark.parametrize(
  ("spellings", "message"),
  [
    ((), "config.ppo.rewards=() must name at least one reward: rm, ensemble:HOW, model:PATH, py"),
    (("reward",), "config.ppo.rewards[0]='reward' must be rm, ensemble:HOW, model:PATH, "),
    (("rm", "x" * 500), "config.ppo.rewards[1]='" + "x" * 76 + "... must be rm"),
    (("rm\x1b[31m",), r"'rm\x1b[31m' must be rm"),
    (("rm:3",), "'rm:3': 'rm' is the run's reward model, and nothing follows it"),
    (("2*",), "'2*' must be rm"),
    (("1e9*rm",), "'1e9*rm' must have a weight of at most 1e+06 in size"),
    (("python:mod",), "'python:mod' must be python:MODULE:FUNCTION, as 'python:checks:is_polite'"),
    (("python:a/b.py:fn",), "must be python:MODULE:FUNCTION"),
    (
      ("ensemble:median",),
      "'ensemble:median' must be ensemble: and one of mean, worst, uncertainty",
    ),
    (("length:",), "'length:' must be length:MIN-MAX in tokens"),
    (("length:-",), "'length:-' must be length:MIN-MAX in tokens"),
    (("length:9-3",), "'length:9-3' must be length:MIN-MAX in tokens"),
    (("format:",), "'format:' must be format: and a regular expression of Python: it is empty"),
    (("format:(",), "missing ), unterminated subpattern at position 0"),
    (("rm", "2*rm"), "names 'rm' more than once: write it once, with the sum of its weights"),
    (("0*rm",), "must give some reward a weight other than 0: a weight of 0 only logs it"),
  ],
)
def test_what_is_refused(spellings, message):
  with pytest.raises(UserError) as error:
    parse(*spellings)
  told = str(error.value)
  assert message in told and told.isprintable() and told.count("\n") == 0 and len(told) < 300
