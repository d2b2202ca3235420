"""Every round's reward model judges the rankings and the policies of all rounds."""

import types
from unittest import mock

from instructjax.stages import answers, policies, ranking_accuracy, rounds
from tests import micro

TIE, ORDER = (types.SimpleNamespace(ranks=ranks) for ranks in ((1, 1), (1, 2)))
# Nobody has decided in the second, and nobody ranked in the third.
HELDOUT = {"collect": [TIE, ORDER], "collect_2": [TIE], "collect_3": []}


def context(number, folder):
  for stage, found in HELDOUT.items():
    (folder / stage).mkdir()
    (folder / stage / "heldout.jsonl").write_text("rankings" if found else "")
  demo = dict(data__comparisons="demo:", data__prompts="demo:")
  return types.SimpleNamespace(
    config=micro.config("ppo_ptx", {}, collect__rounds=number, **demo),
    data=types.SimpleNamespace(
      collected=lambda stage, split: HELDOUT[stage] if split == "heldout" else (stage, split)
    ),
    model=lambda role: role,
    directory=lambda stage: folder / stage,
  )


def test_all_of_all_rounds(tmp_path):
  names = ("ppo_ptx", "ppo_ptx_2", "ppo_ptx_3")
  measured = {n: types.SimpleNamespace(answer=[f"{n} says"], ended=[True]) for n in names}
  with (
    mock.patch.object(policies, "load_reward", lambda ctx, stage: f"weights of {stage}"),
    mock.patch.object(answers, "from_text", lambda ctx, prompts, texts, ended: (prompts, texts)),
    mock.patch.object(answers, "score", lambda ctx, model, params, scored: (model, params, scored)),
    mock.patch.object(ranking_accuracy, "judge", lambda ctx, params, records: (params, records)),
  ):
    first, second, third = rounds.measure(context(3, tmp_path), ["p"], measured)
    assert (
      rounds.measure(types.SimpleNamespace(config=micro.config("ppo_ptx", {})), ["p"], measured)
      == ()
    )
  assert [first.number, second.number, third.number] == [1, 2, 3]
  assert first.judgements == (
    ("weights of rm", ("collect", "validation")),
    ("weights of rm", ("collect_2", "validation")),
    ("weights of rm", ("collect_3", "validation")),
  )
  assert first.heldout == (("weights of rm", [TIE, ORDER]), None, None)
  assert second.reward == {
    name: ("reward", "weights of rm_2", (["p"], [f"{name} says"])) for name in names
  }
