"""Which weights a policy's name stands for: step, average and bias. What is refused, test_pipeline shows."""

import types
from unittest import mock

import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.stages import policies
from instructjax.train import finished
from tests import finished_run, micro


def done(stage, step, result=None):
  return finished.Done(stage, {}, step, result)


def context(*stages, mesh=None, model=None, **changes):
  """A run in which these stages have finished."""
  by_name = {one.stage: one for one in stages}
  return types.SimpleNamespace(
    config=micro.config("ppo_ptx", {}, **changes),
    given={},
    done=by_name.get,
    require_done=by_name.__getitem__,
    mesh=mesh,
    model=model,
  )


def loaded(ctx, policy, **which):
  """What `load` reads: (stage, step, item, role)."""
  found = lambda ctx, stage, step, item="params", role=None: (stage, step, item, role)
  with mock.patch.object(policies, "load_step", found):
    return policies.load(ctx, policy, **which)


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
  assert loaded(ctx, "ppo", step=3) == ("ppo", 3, item, "policy")  # a checkpoint as the end
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


def given(head="lm", params=None):
  """Weights that are not opened: `load` gives `params` and the model that they were loaded for."""
  return types.SimpleNamespace(head=head, load=lambda mesh, model: params or (mesh, model))


def test_given_policies_are_loaded_from_their_files():
  ctx = context(mesh="mesh", model=lambda role: role)
  ctx.given = {"sft": given(), "ppo_init": given()}
  for name in ("sft", "ppo_init"):
    assert policies.load(ctx, name) == ("mesh", "policy")
  assert policies.load_sft_by_loss(ctx) == ("mesh", "policy")


@pytest.mark.parametrize("mean, bias", [(0.75, 1.25), (None, 2.0)])
def test_a_given_reward_model_has_the_bias_that_its_stage_found(mean, bias):
  params = {"head": {"bias": 2.0, "w_D": 1.0}}
  result = results.RewardModel(mean, None, None, ())
  ctx = context(done("rm", None, result), mesh="mesh", model=lambda role: role)
  ctx.given = {"rm": given("scalar", params)}
  assert policies.load_reward(ctx)["head"]["bias"] == bias


def settled(head, **changes):
  opened = []
  locate = lambda path: opened.append(path) or given(head)
  with mock.patch.object(policies.weights, "locate", locate):
    config = policies.settle(micro.config("ppo_ptx", {}, **changes))
  return config.rm.weights, config.reward_model.weights, opened


def test_the_file_tells_whether_a_reward_model_is_finished():
  names = dict(model__weights="base", reward_model__weights="here")
  # One network: without weights of its own, the reward model's base would be the policy's.
  assert settled("scalar", **names) == ("here", "base", ["here"])
  assert settled("lm", **names) == ("", "here", ["here"])
  bigger = names | dict(reward_model__d_mlp=48)
  assert settled("scalar", **bigger) == ("here", "", ["here"])
  assert settled("scalar") == ("", "", [])
  assert settled("scalar", model__weights="base") == ("", "base", [])  # which the policy needs
  assert settled("lm", rm__weights="there") == ("there", "", [])


def test_the_field_is_named_where_nothing_can_be_opened():
  for name, field in (("rm", "rm"), ("sft", "sft"), ("reward_model", "reward_model")):
    config = micro.config("ppo_ptx", {}, **{f"{name}__weights": "/nowhere"})
    with pytest.raises(UserError, match=f"^config.{field}.weights: /nowhere must be"):
      policies.given_weights(policies.settle(config))


def test_finished_policies_give_the_tokenizer():
  """They are trained with it, while a base may lack the tokens of chats."""
  paths = dict(model="a", sft="b", ppo_init="c", rm="d")
  config = micro.config("ppo_ptx", {}, **{f"{k}__weights": v for k, v in paths.items()})
  with mock.patch.object(policies.weights, "locate", lambda path: path):
    opened = policies.given_weights(config)
  assert list(opened.items()) == [("ppo_init", "c"), ("sft", "b"), ("pretrain", "a"), ("rm", "d")]


@pytest.mark.parametrize(
  ("changes", "head", "message"),
  [
    (dict(rm__weights="x"), "lm", "config.rm.weights='x' must be a finished reward model"),
    (
      dict(sft__weights="x"),
      "scalar",
      "config.sft.weights='x' must be a language model, and it is",
    ),
    (
      dict(ppo_init__weights="x", stage="ppo_init"),
      "lm",
      "config.stage='ppo_init' trains what config.ppo_init.weights='x' gives",
    ),
  ],
)
def test_the_wrong_kind_is_one_line(changes, head, message):
  stage = changes.get("stage", "ppo_ptx")
  config = micro.config(stage, {}, **{k: v for k, v in changes.items() if k != "stage"})
  with mock.patch.object(policies.weights, "locate", lambda path: given(head)):
    opened = policies.given_weights(config)
  with pytest.raises(UserError, match="^[^\n]*$") as error:
    policies.require_given_weights(config, opened, types.SimpleNamespace())
  assert message in str(error.value)


@pytest.mark.parametrize("kind", ["stage", "hf"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_another_tokenizer_is_one_line_that_says_how_to_mend_it(kind, head):
  tokenizer = types.SimpleNamespace(fingerprint="ours", path="/ours", vocab_size=7)
  other = types.SimpleNamespace(
    head=head,
    kind=kind,
    path="/there",
    settings={"tokenizer": "theirs"},
    tokenizer=None,
    tokenizer_path="/there/tokenizer",
  )
  with (
    mock.patch.object(policies.tokenizers, "agree", lambda ours, theirs: False),
    pytest.raises(UserError, match="^[^\n]*another tokenizer[^\n]*$") as error,
  ):
    policies._require_tokenizer(micro.config("ppo", {}), other, tokenizer, "config.x.weights='y'")
  text = str(error.value)
  assert ("model:/there" in text) == (head == "scalar")
  assert ("set config.tokenizer.path='/there/tokenizer'" in text) == (
    (head, kind) == ("lm", "stage")
  )


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
