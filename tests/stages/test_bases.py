"""Adapters beside finished networks: what their base is, what they start from, and a run of PPO that is stopped."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.models import adapters, interop, transformer
from instructjax.serve import packaging
from instructjax.stages import bases, lineage, pipeline, policies
from instructjax.train import adapter_base, weights
from tests import finished_run, micro, tiny
from tests.stages import test_pipeline as runs

compiled_once = runs.compiled_once  # three runs of one program
ADAPTED = dict(adapter__rank=2, adapter__alpha=3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run elsewhere that has finished `pretrain`, `ppo_init` and `rm`: (its folder, its config)."""
  folder = tmp_path_factory.mktemp("made")
  config, tokenizer = finished_run.write_run(folder)
  network = config.model.network
  found = {"pretrain": results.Pretrained(1.0), "ppo_init": results.Tuned(())}
  for stage, result in found.items():
    finished_run.write_stage(folder / stage, tokenizer, {"params": (network, "lm")}, result=result)
  result = finished_run.reward_model()
  blocks = {"params": (network, "scalar")}
  finished_run.write_stage(folder / "rm", tokenizer, blocks, result=result)
  return folder, config


def specs(folder):
  return {
    "prompts": f"jsonl:{folder}/data/prompts.jsonl",
    "documents": "",
    "demonstrations": "",
    "comparisons": "",
  }


def given(folder, **changes):
  """PPO from the finished networks of that run, with adapters."""
  paths = dict(ppo_init__weights=f"{folder}/ppo_init", rm__weights=f"{folder}/rm")
  few = dict(ppo__num_iterations=4, ppo__batch_size=4, checkpoint__every_steps=2)
  return micro.config("ppo", specs(folder), **(ADAPTED | paths | few | changes))


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
  """The workdir of PPO with adapters on a given policy and a given reward model; and what it printed."""
  workdir, printed = tmp_path_factory.mktemp("done"), io.StringIO()
  with contextlib.redirect_stdout(printed):
    for stage in ("rm", "ppo"):
      runs.run_stage(given(made[0]), workdir, stage)
  return workdir, printed.getvalue()


def test_ppo_with_adapters_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
  made, done, tmp_path
):
  runs.run_stage(given(made[0]), tmp_path, "rm")
  with runs.interrupted_at(runs.KILL_STEP):
    runs.run_stage(given(made[0]), tmp_path, "ppo")
  assert runs.damaged.saved_steps(tmp_path / "ppo") == [2]
  runs.run_stage(given(made[0]), tmp_path, "ppo")
  runs.assert_same_stage(tmp_path / "ppo", done[0] / "ppo")
  saved = runs.last_checkpoint(done[0] / "ppo")[0]
  moved = [np.frombuffer(x, np.float32) for name, x in saved.items() if "'params'" in name]
  assert any(np.any(x != 0) for x in moved) and all(len(x) < 1000 for x in moved)  # no whole matrix


def test_finished_networks_are_the_bases_of_what_is_trained_from_them(made, done):
  folder, (workdir, printed) = made[0], done
  assert "one XLA program" in printed
  for which, stage in (("ema", "ppo_init"), ("value", "rm")):
    opened = weights.locate(workdir / "ppo", which)
    assert opened.require_base().path == folder / stage
    mesh, model = packaging._network(opened)
    base = opened.require_base().load(mesh, model)
    adapted, trained = opened.load_trained(mesh, model)
    merged = opened.load(mesh, model)
    part = lambda params: params["layers"][0]["mlp"]["w_down_FD"]
    pair = trained["layers"]["mlp"]["down"]
    product = pair["w_a_FE"][0] @ pair["w_b_ED"][0] * (3.0 / 2)
    assert np.any(product != 0)
    np.testing.assert_allclose(part(merged), part(base) + product, rtol=1e-5, atol=1e-6)


def test_what_is_judged_is_the_base_with_what_was_trained_on_it(made, done):
  ctx = runs.context(given(made[0]), done[0])
  plain = bases.bare(ctx.model("policy"))
  wanted = {"ppo": weights.locate(done[0] / "ppo"), "ppo_init": ctx.given["ppo_init"]}
  for name, opened in wanted.items():
    found = logits(ctx, policies.load(ctx, name))
    np.testing.assert_allclose(found, logits(ctx, opened.load(ctx.mesh, plain)), atol=1e-4)
  head = policies.load_reward(ctx)["head"]
  expected = ctx.given["rm"].load(ctx.mesh, bases.bare(ctx.model("reward")))["head"]
  jax.tree.map(np.testing.assert_array_equal, head, expected)


@pytest.mark.parametrize("which", ["ema", "value"])
def test_a_folder_of_peft_comes_with_a_base_that_peft_cannot_load(done, tmp_path, which):
  packaging.write_peft(str(done[0] / "ppo"), tmp_path / "out", which=which)
  opened = weights.locate(tmp_path / "out")
  assert interop.base_of(tmp_path / "out") == tmp_path / "out" / "base"
  mesh, model = packaging._network(opened)
  expected = weights.locate(done[0] / "ppo", which).load(mesh, model)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, opened.load(mesh, model), expected)


def test_another_base_is_one_line(made, done, tmp_path):
  folder, workdir = made[0], done[0]
  elsewhere = runs.copy_without(folder, tmp_path / "moved")
  moved = weights.locate(workdir / "ppo", base=str(elsewhere / "ppo_init"))
  assert moved.require_base().path == elsewhere / "ppo_init"
  finished_run.change_done(elsewhere / "ppo_init", '"config.seed": "0"', '"config.seed": "1"')
  with pytest.raises(UserError, match="^[^\n]*is an adapter of another base than [^\n]*anew since"):
    moved = weights.locate(workdir / "ppo", base=str(elsewhere / "ppo_init"))
    moved.require_base()
  other = runs.copy_without(workdir, tmp_path / "other")
  finished_run.change_done(other / "ppo", "adapter's base", "another key")
  with pytest.raises(
    UserError, match="^[^\n]*does not say which base its adapter belongs to[^\n]*$"
  ):
    weights.locate(other / "ppo")


def test_which_weights_the_bases_are():
  frozen = lambda **changes: lineage.frozen_stages(micro.config("ppo", {}, **changes))
  assert frozen() == ("pretrain", "pretrain")
  assert frozen(reward_model__d_mlp=48) == ("pretrain", "reward_pretrain")
  assert frozen(ppo_init__weights="a") == ("ppo_init", "pretrain")
  assert frozen(ppo_init__weights="a", rm__weights="b") == ("ppo_init", "rm")
  # An SFT model is the reward model's base only if that starts from it.
  assert frozen(sft__weights="a") == ("pretrain", "pretrain")
  assert frozen(sft__weights="a", rm__start_from="sft") == ("pretrain", "sft")


# --- an adapter that is given ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft(made, tmp_path_factory):
  """A folder of peft, rank 2, on the exported `pretrain`."""
  folder = tmp_path_factory.mktemp("peft")
  packaging.write_huggingface(str(made[0] / "pretrain"), folder / "base")
  cfg = tiny.adapter(rank=2, alpha=8.0, targets=made[1].adapter.targets)
  model = tiny.make_model(made[1].model.network, micro.VOCAB_SIZE).clone(adapter=cfg)
  rng = np.random.default_rng(3)
  noise = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
  trained = jax.tree.map(noise, adapters.trained_shapes(model))
  (folder / "adapter").mkdir()
  interop.write_adapter(folder / "adapter", model, trained, str(folder / "base"))
  return folder


def context(made, peft, tmp_path, stage="ppo_init", **changes):
  changes = ADAPTED | dict(model__weights=str(peft / "adapter")) | changes
  data = {kind: f"jsonl:{made[0]}/data/{kind}.jsonl" for kind in specs(made[0])}
  path = str(made[0] / "tokenizer" / "tokenizer.model")
  return runs.context(micro.config(stage, data, tokenizer__path=path, **changes), tmp_path / stage)


def logits(ctx, params):
  token_BL = jnp.arange(6, dtype=jnp.int32)[None]
  inputs = dict(segment_BL=jnp.ones_like(token_BL), position_BL=token_BL)
  return transformer.apply(ctx.model("policy"), params, token_BL, **inputs)


@pytest.mark.parametrize(
  "changes, why",
  [
    ({}, ""),
    ({"adapter__rank": 4}, "its rank is 2, and config.adapter.rank=4"),
    ({"adapter__targets": ("up", "down")}, "it adapts other matrices than"),
  ],
)
def test_a_folder_of_peft_is_trained_on_if_it_fits_and_merged_if_not(
  made, peft, tmp_path, capsys, changes, why
):
  ctx = context(made, peft, tmp_path, **changes)
  whole = ctx.given["pretrain"].load(ctx.mesh, bases.bare(ctx.model("policy")))
  with jax.set_mesh(ctx.mesh):
    base = bases.base(ctx, "ppo_init")
    trained = bases.first(ctx, "pretrain", "policy", ctx.key("ppo_init"))
    judged = policies.load(ctx, "base")
  printed = capsys.readouterr().out
  assert (f"merged into its base: {why}" if why else "it is trained on") in printed
  b = trained["layers"]["mlp"]["down"]["w_b_ED"]
  assert bool(np.any(b != 0)) == (not why)  # a fresh adapter is nothing
  expected = logits(ctx, whole)
  for params in (adapters.joined(ctx.model("policy"), base, trained), judged):
    np.testing.assert_allclose(logits(ctx, params), expected, rtol=2e-4, atol=2e-4)
  record = adapter_base.BaseRecord.of(
    pipeline.module("sft").stage_run(ctx, "ppo_init").fingerprint,
    adapter_base.BASE,
    "",
  )
  assert (record.stage, record.kind, record.inside) == ("pretrain", "hf", not why)


def test_adapters_of_one_base_share_it(made, peft, tmp_path):
  """A policy and a reward model that are two folders of peft on one base, which is in memory once."""
  ctx = context(made, peft, tmp_path)
  model = ctx.model("reward")
  trained = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), adapters.trained_shapes(model))
  (tmp_path / "reward").mkdir()
  interop.write_adapter(tmp_path / "reward", model, trained, str(peft / "base"))
  paths = dict(ppo_init__weights=str(peft / "adapter"), rm__weights=str(tmp_path / "reward"))
  ctx = context(made, peft, tmp_path, "ppo", model__weights="", **paths)
  assert lineage.frozen_stages(ctx.config) == ("ppo_init", "rm")
  _, nets = pipeline.module("ppo")._settings(ctx, "ppo")
  assert nets.shares_base and bases.of_networks(ctx, "ppo")[1] == ()
  assert jax.tree.leaves(bases.base(ctx, "rm"))[0] is jax.tree.leaves(bases.base(ctx, "ppo"))[0]
  found = bases.given(ctx, "rm", is_trained=True)
  for part in ("w_a_FE", "w_b_ED"):
    factor = found["layers"]["mlp"]["down"][part]
    np.testing.assert_array_equal(factor, trained["layers"]["mlp"]["down"][part])
  np.testing.assert_array_equal(found["head"]["w_D"], trained["head"]["w_D"])


def test_a_reward_model_may_start_from_a_given_adapter_under_a_fresh_head(made, peft, tmp_path):
  ctx = context(made, peft, tmp_path)
  policy, reward = (
    bases.first(ctx, "pretrain", role, jax.random.key(0)) for role in ("policy", "reward")
  )
  jax.tree.map(np.testing.assert_array_equal, policy["layers"], reward["layers"])
  assert np.any(reward["head"]["w_D"] != 0)
