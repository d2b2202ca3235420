"""Choosing the SFT epoch: by the mean score of answers to validation prompts, under one key for all epochs."""

import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core import results
from instructjax.stages import answers, policies, sft_select
from tests import micro

# Step -> scores. The epoch with the best single answer, the one with the best loss and the last are others.
SCORES = {2: [0.0, 9.0, 0.0], 4: [5.0, 4.0, 6.0], 6: [1.0, 1.0, 1.0], 8: [2.0, 2.0, 2.0]}
LOSSES = {2: 3.0, 4: 2.0, 6: 1.0, 8: 4.0}


@pytest.mark.parametrize("settings", ["same", "other"])
def test_the_epoch_with_the_highest_mean_score_is_chosen(settings):
  epochs = tuple(results.Epoch(step, loss, 10 * loss) for step, loss in LOSSES.items())
  run = types.SimpleNamespace(fingerprint="same")
  asked, finished = [], []
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__num_prompts=3, evaluate__temperature=0.5),
    data=types.SimpleNamespace(prompt_tokens={"validation": [[n] for n in range(9)]}.__getitem__),
    done=lambda stage: types.SimpleNamespace(fingerprint=settings) if settings == "same" else None,
    require_done=lambda stage: types.SimpleNamespace(result={"sft": results.Tuned(epochs)}[stage]),
    model=lambda role: role,
    key=lambda stage: stage,
  )

  def sample(ctx, model, params, prompts, key, *, temperature):
    asked.append((model, prompts, key, temperature))
    return params

  def score(ctx, model, params, found):
    assert (model, params) == ("reward", "reward weights")
    return np.array(SCORES[found])

  with (
    mock.patch.object(sft_select, "stage_run", lambda ctx, stage: run),
    mock.patch.object(sft_select, "finish", lambda ctx, *rest: finished.append(rest)),
    mock.patch.object(policies, "load_reward", lambda ctx: "reward weights"),
    mock.patch.object(policies, "load_step", lambda ctx, stage, step: {"sft": step}[stage]),
    mock.patch.object(answers, "sample", sample),
    mock.patch.object(answers, "score", score),
  ):
    sft_select.run(ctx, "sft_select")
  if settings == "same":
    assert not finished and not asked
    return
  assert asked == [("policy", [[0], [1], [2]], "sft_select", 0.5)] * 4
  ((stage, _, step, result),) = finished
  assert (stage, step) == ("sft_select", 4)
  assert [(e.step, e.reward, e.validation_loss) for e in result.epochs] == [
    (2, 3.0, 3.0),
    (4, 5.0, 2.0),
    (6, 1.0, 1.0),
    (8, 2.0, 4.0),
  ]
