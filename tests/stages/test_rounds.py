"""Every round's reward model judges the rankings and the policies of all rounds."""

import types
from unittest import mock

from instructjax.stages import answers, policies, ranking_accuracy, rounds
from tests import micro


def context(number):
  demo = dict(data__comparisons="demo:", data__prompts="demo:")
  return types.SimpleNamespace(
    config=micro.config("ppo_ptx", {}, collect__rounds=number, **demo),
    data=types.SimpleNamespace(collected=lambda stage, split: (stage, split)),
    model=lambda role: role,
  )


def test_all_of_all_rounds():
  names = ("ppo_ptx", "ppo_ptx_2")
  measured = {n: types.SimpleNamespace(answer=[f"{n} says"], ended=[True]) for n in names}
  with (
    mock.patch.object(policies, "load_reward", lambda ctx, stage: f"weights of {stage}"),
    mock.patch.object(answers, "from_text", lambda ctx, prompts, texts, ended: (prompts, texts)),
    mock.patch.object(answers, "score", lambda ctx, model, params, scored: (model, params, scored)),
    mock.patch.object(ranking_accuracy, "judge", lambda ctx, params, records: (params, records)),
  ):
    first, second = rounds.measure(context(2), ["p"], measured)
    assert rounds.measure(context(1), ["p"], measured) == ()
  assert (first.number, second.number) == (1, 2)
  assert first.judgements == (
    ("weights of rm", ("collect", "validation")),
    ("weights of rm", ("collect_2", "validation")),
  )
  assert second.reward == {
    name: ("reward", "weights of rm_2", (["p"], [f"{name} says"])) for name in names
  }
