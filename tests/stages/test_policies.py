"""Which weights a policy's name stands for: step, average and bias. What is refused, test_pipeline shows."""

import types
from unittest import mock

import pytest

from instructjax.core import results
from instructjax.stages import policies
from instructjax.train import finished
from tests import finished_run, micro


def done(stage, step, result=None):
  return finished.Done(stage, {}, step, result)


def context(*stages, **changes):
  """A run in which these stages have finished."""
  by_name = {one.stage: one for one in stages}
  return types.SimpleNamespace(
    config=micro.config("ppo_ptx", {}, **changes),
    given={},
    done=by_name.get,
    require_done=by_name.__getitem__,
  )


def loaded(ctx, policy):
  """What `load` reads: (stage, step, item, role)."""
  found = lambda ctx, stage, step, item="params", role=None: (stage, step, item, role)
  with mock.patch.object(policies, "load_step", found):
    return policies.load(ctx, policy)


@pytest.mark.parametrize(
  ("changes", "item"),
  [
    (dict(evaluate__weights="ema"), "ema_params"),
    (dict(evaluate__weights="raw"), "params"),
    (dict(evaluate__weights="ema", ppo__ema_decay=0.0), "params"),
  ],
)
def test_rl_policies_are_averaged_as_configured_and_others_never(changes, item):
  ctx = context(done("ppo_ptx", 9), done("ppo", 8), done("ppo_init", 5), **changes)
  assert loaded(ctx, "ppo_ptx") == ("ppo_ptx", 9, item, "policy")
  assert loaded(ctx, "ppo") == ("ppo", 8, item, "policy")
  assert loaded(ctx, "ppo_init") == ("ppo_init", 5, "params", "policy")


def test_sft_is_the_epoch_that_the_reward_model_chose_once_it_has():
  assert loaded(context(done("sft", 4)), "sft") == ("sft", 4, "params", "policy")
  ctx = context(done("sft", 4), done("sft_select", 2))
  assert loaded(ctx, "sft") == ("sft", 2, "params", "policy")
  found = lambda ctx, stage, step: (stage, step)
  with mock.patch.object(policies, "load_step", found):
    assert policies.load_sft_by_loss(ctx) == ("sft", 4)  # what the reward model starts from


def test_a_shared_base_is_read_as_the_role_that_asks():
  ctx = context(done("pretrain", 3))
  assert loaded(ctx, "base") == ("pretrain", 3, "params", "policy")
  assert loaded(ctx, "reward_base") == ("pretrain", 3, "params", "reward_base")


def test_the_reward_model_scores_demonstrations_0():
  result = finished_run.reward_model(mean=0.75)
  assert isinstance(result, results.RewardModel)
  ctx = context(done("rm", 6, result))
  params = {"head": {"bias": 2.0, "w_D": 1.0}, "trunk": 3.0}
  with mock.patch.object(
    policies, "load_step", lambda ctx, stage, step: {("rm", 6): params}[stage, step]
  ):
    found = policies.load_reward(ctx)
  assert found == {"head": {"bias": 1.25, "w_D": 1.0}, "trunk": 3.0}
