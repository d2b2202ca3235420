"""Collecting comparisons: whose labels, on which prompts, and as many answers as asked for."""

import json
import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data.records import Prompt, Ranking
from instructjax.stages import answers, collect, context, judging, policies
from tests import micro


@pytest.mark.parametrize("stage, first_item", [("collect", 0), ("collect_2", collect._ROUND)])
def test_training_and_held_out_labelers_rank_what_is_theirs(tmp_path, stage, first_item):
  """In a later round they make errors of their own, not those of the first."""
  ctx = types.SimpleNamespace(
    config=micro.config("rm", {}, data__comparisons="demo:", seed=5),
    data=types.SimpleNamespace(records=lambda kind, split: f"{split} {kind}"),
    directory=lambda stage: tmp_path / "run" / stage,
    contents=types.SimpleNamespace(
      of_written=lambda stage: types.SimpleNamespace(digests=("t", "v", "h"))
    ),
  )
  finished = []

  class Simulation:
    @staticmethod
    def collect_rankings(sampled, group, seed, first):
      assert (seed, first) == (5, first_item)
      return [Ranking(sampled, ("a", "b"), (1, 2), group)]

    @staticmethod
    def labeler_agreement(sampled, group, seed):
      assert sampled == "answers to 8 of validation prompts" and seed == 5
      return dict(agreement={"train": 0.25, "heldout": 0.5}[group], pairs=1)

  sampled = lambda ctx, stage, split, prompts, count: f"answers to {count} of {prompts}"
  with (
    mock.patch.object(collect, "stage_run", lambda *a, **k: None),
    mock.patch.object(collect, "is_finished", lambda run: False),
    mock.patch.object(collect, "_sampled", sampled),
    mock.patch.object(collect, "finish", lambda ctx, *rest: finished.append(rest)),
    mock.patch.object(collect.results, "Agreement", lambda agreement, pairs: agreement),
    mock.patch.object(judging, "require_simulation", lambda ctx: Simulation),
  ):
    collect.run(ctx, stage)
  written = {
    path.stem: json.loads(path.read_text()) for path in (tmp_path / "run" / stage).iterdir()
  }
  found = {split: (row["prompt"], row["labeler"]) for split, row in written.items()}
  held_out = "answers to 8 of validation prompts"
  assert found == {
    "train": ("answers to 16 of train prompts", "train"),
    "validation": (held_out, "train"),
    "heldout": (held_out, "heldout"),  # the same answers
  }
  ((name, _, step, result),) = finished
  assert (name, step) == (stage, None)
  assert (result.agreement.train, result.agreement.heldout) == (0.25, 0.5)
  assert result.files == {"train": "t", "validation": "v", "heldout": "h"}


@pytest.mark.parametrize("count", [2, 7])
def test_every_prompt_gets_its_own_answers(count):
  """From two to three each. Of five prompts, seven are all of them and two for the second time."""
  prompts = [Prompt(text) for text in "abcde"]
  ctx = types.SimpleNamespace(
    config=micro.config("rm", {}),
    tokenizer=types.SimpleNamespace(encode=lambda text: [text], bos_id=None),
    data_seed=lambda stage: 1,
    key=lambda name: name,
    model=lambda role: role,
  )

  def sample(ctx, model, params, tokens, key, *, temperature):
    assert (model, params, key, temperature) == ("policy", "sft", "collect/train", 1.0)
    return types.SimpleNamespace(text=[f"{text}{n}" for n, (text,) in enumerate(tokens)])

  with (
    mock.patch.object(answers, "sample", sample),
    mock.patch.object(policies, "load_sft_by_loss", lambda ctx: "sft"),
  ):
    found = collect._sampled(ctx, "collect", "train", prompts, count)
    again = collect._sampled(ctx, "collect", "train", prompts, count)
  assert found == again and len(found) == count
  asked = [prompt for prompt, _ in found]
  assert len(set(asked)) == min(count, 5)
  texts = [text for _, texts in found for text in texts]
  assert texts == [
    f"{prompt}{n}" for n, prompt in enumerate(np.repeat(asked, [len(t) for _, t in found]))
  ]
  counts = {len(texts) for _, texts in found}
  assert counts <= {2, 3} and (count < 7 or len(counts) == 2)


def test_in_later_rounds_the_newest_policy_answers():
  load = lambda ctx, policy: f"weights of {policy}"
  with (
    mock.patch.object(policies, "load", load),
    mock.patch.object(policies, "load_sft_by_loss", lambda ctx: "sft by loss"),
  ):
    found = [collect._speaker(None, stage) for stage in ("collect", "collect_2", "collect_3")]
  assert found == ["sft by loss", "weights of ppo_ptx", "weights of ppo_ptx_2"]


def test_a_given_reward_model_learns_from_no_further_round():
  demo = dict(data__comparisons="demo:", data__prompts="demo:")
  cfg = micro.config("ppo_ptx", {}, rm__weights="there", collect__rounds=2, **demo)
  collect.check_settings(cfg, "collect")
  with pytest.raises(
    UserError, match="collect.rounds=2 must be 1 beside the finished reward model"
  ):
    collect.check_settings(cfg, "collect_2")


def test_a_finished_round_is_still_the_same_when_another_is_asked_for():
  one, two = (
    micro.config("ppo_ptx", {}, data__comparisons="demo:", collect__rounds=rounds).collect
    for rounds in (1, 2)
  )
  assert context.canonical(one) == context.canonical(two)
