"""Tests of instructjax.stages.measuring: how a policy's answers are sampled and measured."""

import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core.stages import REFERENCE
from instructjax.ops import kl
from instructjax.report.results import Measured
from instructjax.stages import answers, measuring, policies
from tests import micro


def test_the_kl_is_from_the_reference_and_in_the_form_that_ppo_uses(monkeypatch):
  logprobs = {"ppo": np.array([-3.0, -1.0]), REFERENCE: np.array([-5.0, -1.5])}
  sampled = types.SimpleNamespace(
    text=["a", "b"], ended_N=np.ones(2, bool), is_response_NR=np.ones((2, 4), bool)
  )
  monkeypatch.setattr(measuring, "sample", lambda ctx, *rest: sampled)
  monkeypatch.setattr(policies, "load", lambda ctx, policy, step: policy)
  monkeypatch.setattr(policies, "load_reward", mock.Mock())
  monkeypatch.setattr(answers, "from_text", mock.Mock())
  monkeypatch.setattr(answers, "score", mock.Mock())
  monkeypatch.setattr(answers, "logprob", lambda ctx, model, params, *rest: logprobs[params])
  ctx = mock.Mock()
  ctx.config.data.prompts = "jsonl:prompts"
  measure = lambda: measuring.measure(ctx, "ppo", ["x", "y"], "evaluate")
  np.testing.assert_array_equal(measure().kl, [2.0, 0.5])
  monkeypatch.setitem(kl.FORMS, "k2", lambda logprob, ref_logprob: (logprob - ref_logprob) ** 2 / 2)
  monkeypatch.setattr(kl, "FORM", "k2")
  np.testing.assert_array_equal(measure().kl, [2.0, 0.125])


@pytest.mark.parametrize(("name", "cut"), [("ppo", False), ("base", True), ("reward_base", True)])
def test_answers_of_untuned_policies_end_at_a_newline(monkeypatch, name, cut):
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__temperature=0.5),
    tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
    model=lambda role: f"{role} model",
    key=lambda name: f"key of {name}",
  )
  monkeypatch.setattr(policies, "load", lambda ctx, name, step: f"weights of {name}")
  monkeypatch.setattr(answers, "sample", lambda ctx, *a, **k: (a, k))
  arguments, kwargs = measuring.sample(ctx, name, ["ab"], "evaluate")
  role = {"reward_base": "reward_base"}.get(name, "policy")
  expected = f"{role} model", f"weights of {name}", [["a", "b"]], f"key of evaluate/{name}"
  assert arguments == expected
  assert kwargs == dict(temperature=0.5, prompt_length=36, to_newline=cut)


def test_the_number_of_examples_is_the_one_that_scores_best(monkeypatch):
  """By the score on the counted prompts alone: the first two of four answers."""
  golds = {1: [1.0, 1.0, 9.0, 9.0], 2: [2.0, 3.0, 0.0, 0.0], 3: [2.0, 2.0, 5.0, 5.0]}

  def measure(ctx, name, prompts, stage, shots):
    assert (name, prompts, stage) == ("few_shot", ["p"] * 4, "evaluate")
    some = np.zeros(4)
    return Measured(
      list("abcd"), some, some, some, None, np.array(golds[shots]), some, some, None, None
    )

  monkeypatch.setattr(measuring, "measure", measure)
  best, scores = measuring.best_few_shot(None, ["p"] * 4, "evaluate", np.array([0, 1]))
  assert scores == {1: 1.0, 2: 2.5, 3: 2.0}
  np.testing.assert_array_equal(best.gold, golds[2])


@pytest.mark.parametrize(("context", "columns"), [(150, 140), (8192, 256)])
def test_a_few_shot_prompt_does_not_fill_a_long_context(monkeypatch, context, columns):
  """130 tokens with 10 to answer: what the context has room for, but at most the next multiple of 128 columns."""
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, reward_model__max_length=context, data__max_response_length=10),
    tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
  )
  task = types.SimpleNamespace(few_shot_prompt=lambda prompt, num_examples: prompt + "x" * 129)
  monkeypatch.setattr(measuring.sources, "require_simulation", lambda spec: task)
  texts, length = measuring.few_shot_prompts(ctx, ["p"])
  assert (len(texts[0]), length) == (130, columns)


def test_a_checkpoint_is_sampled_and_measured_from_the_reference_itself(monkeypatch):
  """Its own weights answer and give the log-probability; the reference has no such checkpoint."""
  logprobs = {("ppo", 3): np.array([-1.0]), (REFERENCE, None): np.array([-5.0])}
  sampled = types.SimpleNamespace(
    text=["a"], ended_N=np.ones(1, bool), is_response_NR=np.ones((1, 4), bool)
  )
  asked = []
  monkeypatch.setattr(policies, "load", lambda ctx, policy, step: (policy, step))
  monkeypatch.setattr(policies, "load_reward", mock.Mock())
  monkeypatch.setattr(
    answers, "sample", lambda ctx, model, params, *a, **k: asked.append(params) or sampled
  )
  monkeypatch.setattr(answers, "from_text", mock.Mock())
  monkeypatch.setattr(answers, "score", mock.Mock())
  monkeypatch.setattr(answers, "logprob", lambda ctx, model, params, *rest: logprobs[params])
  ctx = mock.Mock()
  ctx.config.data.prompts = "jsonl:prompts"
  ctx.tokenizer = types.SimpleNamespace(encode=list, bos_id=None)
  np.testing.assert_array_equal(measuring.measure(ctx, "ppo", ["x"], "evaluate", step=3).kl, [4.0])
  assert asked == [("ppo", 3)]


def test_checkpoints_that_were_not_kept_are_told_and_left_out(monkeypatch, tmp_path, capsys):
  """Of 8 iterations 2, 4 and 6 are asked for; `ppo` has two of them and others, and `ppo_beta0`, of 4, none."""
  cfg = micro.config(
    "ppo_ptx",
    {},
    ppo__num_iterations=8,
    evaluate__compare=("ppo",),
    evaluate__overoptimization=True,
    evaluate__overoptimization_iterations=4,
    evaluate__checkpoints=3,
  )
  saved = {"ppo": [2, 5, 6, 8], "ppo_ptx": [2, 4, 6, 8], "ppo_beta0": [4]}
  monkeypatch.setattr(measuring.damaged, "saved_steps", lambda folder: saved[folder.name])
  measure = lambda ctx, name, prompts, stage, *, step: (name, prompts, stage, step)
  monkeypatch.setattr(measuring, "measure", measure)
  damage = {}
  monkeypatch.setattr(measuring.manifest, "find_damage", damage.get)
  ctx = types.SimpleNamespace(config=cfg, directory=lambda stage: tmp_path / stage)
  found = measuring.measure_checkpoints(ctx, ["p"], "evaluate")
  # Each step draws with a key of its own, and none with that of the finished policy.
  asked = lambda name, *steps: {s: (name, ["p"], f"evaluate/step_{s}", s) for s in steps}
  assert found == {"ppo": asked("ppo", 2, 6), "ppo_ptx": asked("ppo_ptx", 2, 4, 6)}
  (line,) = capsys.readouterr().out.splitlines()
  assert line == (
    "evaluate measures no checkpoints of steps that were not kept, though evaluate.checkpoints=3 asks for them: ppo: 4;"
    " ppo_beta0: 1, 2, 3"
  )
  saved |= {"ppo": [2, 4, 6], "ppo_beta0": [1, 2, 3]}
  assert len(measuring.measure_checkpoints(ctx, ["p"], "evaluate")) == 3
  assert capsys.readouterr().out == ""
  # One that is damaged is left out too: nothing goes on from it.
  damage[tmp_path / "ppo" / "checkpoints" / "4"] = "a has other bytes than were saved"
  assert list(measuring.measure_checkpoints(ctx, ["p"], "evaluate")["ppo"]) == [2, 6]
  said = capsys.readouterr().out
  assert said == "evaluate leaves out step 4 of ppo: a has other bytes than were saved\n"
