"""Who judges a run's answers: a task's own module, or one that asks the run's base, each answer once."""

import types

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.stages import answers, judging, policies
from tests import micro


def context(prompts):
  model = types.SimpleNamespace(clone=lambda adapter: ("policy", adapter))
  return types.SimpleNamespace(
    config=micro.config("ppo", {}, data__prompts=prompts), model=lambda role: model
  )


def test_a_task_that_needs_no_network_judges_itself():
  assert judging.simulation(context("demo:")) is sources.simulation("demo:")
  assert judging.simulation(context("jsonl:a")) is None
  assert judging.require_simulation(context("demo:")) is sources.simulation("demo:")
  with pytest.raises(UserError, match="and these are 'jsonl:a'"):
    judging.require_simulation(context("jsonl:a"))


def test_the_base_reads_each_answer_once(monkeypatch):
  asked = []

  def mean_logprob(ctx, model, params, prompts, texts):
    assert (model, params) == (("policy", None), "weights of base")
    asked.append(list(zip(prompts, texts)))
    return np.array([-len(text) for text in texts], np.float32)

  monkeypatch.setattr(answers, "mean_logprob", mean_logprob)
  monkeypatch.setattr(policies, "load", lambda ctx, name: f"weights of {name}")
  judge = judging.simulation(context("conversation:"))
  assert judge.logprob(["p", "p", "q"], ["a", "a", "bb"]).tolist() == [-1, -1, -2]
  assert judge.logprob(["q", "q"], ["bb", "ccc"]).tolist() == [-2, -3]
  assert asked == [[("p", "a"), ("q", "bb")], [("q", "ccc")]]
