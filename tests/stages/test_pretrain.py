"""Pretraining: which text it reads, which it is measured on, and which step is kept."""

import contextlib
import types
from unittest import mock

import pytest

from instructjax.stages import pretrain
from instructjax.train import loop, saved_state, supervised
from tests import micro


@pytest.mark.parametrize(
  ("stage", "role", "steps"), [("pretrain", "policy", 7), ("reward_pretrain", "reward_base", 9)]
)
def test_a_base_learns_training_text_and_keeps_its_best_step(stage, role, steps):
  ctx = types.SimpleNamespace(
    config=micro.config(
      "ppo", {}, pretrain__num_steps=7, reward_pretrain__num_steps=9, reward_pretrain__length=50
    ),
    mesh="mesh",
    model=lambda role: f"{role} model",
    key=lambda stage: f"key of {stage}",
    data_seed=lambda stage: f"seed of {stage}",
  )
  length = {"pretrain": 60, "reward_pretrain": 50}[stage]
  made, finished, fitted = [], [], {}

  def batches(ctx, split, **kwargs):
    made.append((split, kwargs))
    return "batches"

  fit = lambda run, state, step, batches, **kwargs: fitted.update(
    kwargs, state=state, step=step, batches=batches
  )
  run = lambda ctx, stage: types.SimpleNamespace(directory=f"folder of {stage}")
  best = lambda directory, metric: {(f"folder of {stage}", "validation/loss"): (4, 1.5)}[
    directory, metric
  ]
  with contextlib.ExitStack() as stack:
    patch = lambda *args: stack.enter_context(mock.patch.object(*args))
    patch(pretrain, "stage_run", run)
    patch(pretrain, "bare", lambda model: model)
    patch(pretrain, "is_finished", lambda run: False)
    patch(pretrain, "make_optimizer", lambda optim, num_steps: f"tx of {num_steps}")
    patch(pretrain, "finish", lambda ctx, *rest: finished.append(rest))
    patch(pretrain, "document_batches", batches)
    patch(pretrain, "validation_rows", lambda ctx, length: f"held-out rows of {length}")
    patch(supervised, "init_params", lambda mesh, model, key: f"fresh {model} by {key}")
    patch(supervised, "create_state", lambda *a: (a, "shardings"))
    patch(supervised, "make_lm_train_step", lambda *a, **k: (a, k))
    patch(supervised, "make_lm_evaluation", lambda *a: lambda params, rows: (params, rows))
    patch(loop, "fit", fit)
    patch(saved_state, "best_step", best)
    pretrain.run(ctx, stage)
  assert made == [("train", dict(length=length, batch_size=8, seed=f"seed of {stage}"))]
  model, key = f"{role} model", f"key of {stage}"
  assert fitted["state"] == ("mesh", model, f"tx of {steps}", f"fresh {model} by {key}", key)
  assert fitted["step"] == (
    (model, f"tx of {steps}"),
    dict(dropout_rate=0.0, state_shardings="shardings", microbatches=1),
  )
  assert (fitted["batches"], fitted["num_steps"]) == ("batches", steps)
  # Every second step, and the last.
  asked = {step for step in range(steps + 1) if step in fitted["evaluate_steps"]}
  assert asked == {2, 4, 6, steps} | ({8} if steps > 8 else set())
  assert fitted["best_metric"] == "validation/loss"
  state = types.SimpleNamespace(params="params")
  assert fitted["evaluate"](state, 2) == {"loss": ("params", f"held-out rows of {length}")}
  with mock.patch.object(pretrain.flops, "forward", lambda *a: a):
    assert fitted["flops"]({"tokens": 7}) == (model, 7, length) * 3  # forward and backward
  ((name, _, step, result),) = finished
  assert (name, step, result.validation_loss) == (stage, 4, 1.5)


def test_the_schedule_is_checked_over_all_steps():
  config, checked = micro.config("ppo", {}, pretrain__num_steps=7), []
  with mock.patch.object(pretrain, "require_steps", lambda *a: checked.append(a)):
    pretrain.check_settings(config, "pretrain")
  assert checked == [(config.pretrain.optim, 7, "config.pretrain.optim")]
