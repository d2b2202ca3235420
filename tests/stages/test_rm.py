"""The reward model's train step: eq. 1 through the model, in one forward, blind to padding."""

import functools
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig, RMConfig
from instructjax.core.errors import UserError
from instructjax.core.structs import RankedBatch
from instructjax.data import records, sources
from instructjax.data.batching import ranked_batch
from instructjax.data.tokenize import RankingTokens
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.stages import rm, run_data
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer
from tests import micro, tiny

VOCAB, ROWS, ANSWERS, LENGTH, GOOD = 23, 8, 4, 8, 5


SHARED_ROWS = 8  # of 3 * LENGTH tokens; as many as eight devices


def rankings(seed):
  """Two to four answers a prompt, ranked by how often they say GOOD; equal counts are ties."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(ROWS):
    prompt = rng.integers(0, VOCAB, 2).tolist()
    size_C = rng.integers(2, LENGTH - 1, rng.integers(2, ANSWERS + 1))
    drawn = [(rng.integers(0, VOCAB, size), rng.random(size) < 0.3) for size in size_C]
    responses = [np.where(is_good, GOOD, token).tolist() for token, is_good in drawn]
    counts = [response.count(GOOD) for response in responses]
    result.append(RankingTokens(prompt, responses, [1 + max(counts) - n for n in counts], None))
  return result


def ranked(seed, shared=False):
  length, num_rows = (3 * LENGTH, SHARED_ROWS) if shared else (LENGTH, None)
  return ranked_batch(
    rankings(seed), max_responses=ANSWERS, length=length, vocab_size=VOCAB, num_rows=num_rows
  )


@pytest.fixture(scope="module")
def model(tiny_config):
  return tiny.make_model(tiny_config, VOCAB, "scalar")


@pytest.fixture(scope="module")
def start(quick_jit, model, adam_config, random_params):
  """start(mesh) -> (train step, fresh state); one compiled step a mesh."""
  cfg = RMConfig(
    start_from="sft",
    num_epochs=1,
    batch_size=ROWS,
    max_responses=ANSWERS,
    row_length=0,
    ties="drop",
    optim=adam_config,
    cross_validation_folds=0,
    cross_validation_prompts=1,
  )
  tx, steps = make_optimizer(adam_config, 100), {}

  def one(mesh):
    placed = jax.device_put(random_params(model, 1), models.param_shardings(mesh, model)[0])
    with mock.patch.object(jax, "jit", quick_jit):
      state, shardings = supervised.create_state(mesh, model, tx, placed, jax.random.key(0))
      steps.setdefault(mesh, rm.make_train_step(model, tx, cfg, shardings))
    return steps[mesh], state

  return one


@pytest.fixture(scope="module")
def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


def test_details_18_loss_is_equation_1_over_scores_of_each_answer_alone(
  quick_jit, model, random_params, start, one_device
):
  batch = ranked(0)
  alone = quick_jit(scoring.sequence_score, static_argnums=0)
  flat = batch.token_SL  # any order of rows will do: no answer sees another
  score_BC = np.asarray(alone(model, random_params(model, 1), flat[::-1], flat[::-1] < VOCAB))
  score_BC = score_BC[::-1].reshape(ROWS, ANSWERS).astype(np.float64)
  losses, right = [], []
  for score_C, rank_C, is_answer_C in zip(score_BC, batch.rank_BC, batch.is_answer_BC):
    pairs = list(itertools.combinations(np.flatnonzero(is_answer_C), 2))
    strict = [
      (i, j) if rank_C[i] < rank_C[j] else (j, i) for i, j in pairs if rank_C[i] != rank_C[j]
    ]
    margins = np.array([score_C[i] - score_C[j] for i, j in strict])
    if len(margins):
      losses.append(np.sum(np.log1p(np.exp(-margins))) / len(pairs))
      right += list(margins > 0)
  assert len(set(batch.is_answer_BC.sum(1))) > 1  # prompts of different K
  step, state = start(one_device)
  _, metrics = step(state, batch)
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_details_1_the_reward_model_learns_from_prompt_and_answer(quick_jit, model, random_params):
  """Rows as the data pipeline builds them: the same answers under another prompt score otherwise."""
  answers = [[5, 6, 7], [8, 9]]
  rankings = [RankingTokens(prompt, answers, [1, 2], None) for prompt in ([1, 2, 3], [4, 2, 3])]
  batch = ranked_batch(rankings, max_responses=2, length=LENGTH, vocab_size=VOCAB)
  params = random_params(model, 1)
  score_BC = quick_jit(rm.scores, static_argnums=0)(model, params, batch)
  assert np.all(np.abs(score_BC[0] - score_BC[1]) > 1e-3)
  whole = np.array([[4, 2, 3, 8, 9]], np.int32)
  alone = quick_jit(scoring.sequence_score, static_argnums=0)
  np.testing.assert_allclose(score_BC[1, 1], alone(model, params, whole, whole >= 0)[0], atol=1e-5)


def test_all_answers_go_through_one_forward(model):
  shapes = []

  def apply(model, params, token_BL, **_):
    shapes.append(token_BL.shape)
    return jnp.zeros(token_BL.shape)

  with mock.patch.object(models.transformer, "apply", apply):
    score_BC = rm.scores(model, {}, ranked(0))
  assert shapes == [(ROWS * ANSWERS, LENGTH)] and score_BC.shape == (ROWS, ANSWERS)


def test_answers_that_share_rows_give_the_same_loss_and_gradient(start, one_device):
  """Ties, prompts of different K, answers of a prompt in different rows."""
  apart, together = ranked(0), ranked(0, shared=True)
  np.testing.assert_array_equal(together.is_answer_BC, apart.is_answer_BC)
  assert together.token_SL.size < 0.8 * apart.token_SL.size
  assert len(set(together.last_BC[0][together.is_answer_BC[0]] // (3 * LENGTH))) > 1
  results = []
  for batch in (apart, together):
    step, state = start(one_device)
    state, metrics = step(state, batch)
    results.append((metrics, state.opt_state))  # Adam's first moment is the gradient
  assert 0 < results[0][0]["loss"] and results[0][0]["grad_norm"] > 0.1
  for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(results[1][0]["loss"], results[0][0]["loss"], rtol=1e-6)


def test_padding_and_missing_answers_change_nothing(start, one_device):
  batch, rng = ranked(0), np.random.default_rng(9)
  filled = lambda mask, x: np.where(mask, x, rng.integers(0, VOCAB, x.shape, np.int32))
  garbage = RankedBatch(
    filled(batch.segment_SL > 0, batch.token_SL),
    batch.segment_SL,
    filled(batch.is_answer_BC, batch.last_BC),
    filled(batch.is_answer_BC, batch.rank_BC),
    batch.is_answer_BC,
  )
  results = []
  for variant in (batch, garbage):
    step, state = start(one_device)
    state, metrics = step(state, variant)
    results.append((metrics, state.params))
  num_tokens = sum(len(i.prompt) + len(r) for i in rankings(0) for r in i.responses)
  assert results[0][0]["tokens"] == num_tokens
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_it_learns_to_rank(start, one_device):
  step, state = start(one_device)
  accuracy, compiled = [], None
  for seed in range(60):
    state, metrics = step(state, ranked(seed))  # fresh answers: what is learnt generalises
    accuracy.append(float(metrics["accuracy"]))
    compiled = compiled if seed else step._cache_size()
  assert np.mean(accuracy[-10:]) > 0.9 > np.mean(accuracy[:3]) + 0.1
  assert int(state.step) == 60 and step._cache_size() == compiled


@pytest.mark.parametrize("shared", [False, True])
def test_eight_devices_equal_one(start, one_device, mesh, shared):
  def run(mesh):
    with jax.set_mesh(mesh):
      step, state = start(mesh)
      for seed in range(2):
        state, metrics = step(state, sharding.place_batch(mesh, ranked(seed, shared)))
    return metrics, state.params

  for got, expected in zip(
    jax.tree.leaves(run(mesh)), jax.tree.leaves(run(one_device)), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def checked(tmp_path, monkeypatch, rows, **changes):
  """Runs `rm.check` on comparisons, with a character for a token; returns how many rankings it made batches of."""
  micro.write_lines(tmp_path / "rows.jsonl", rows)
  config = micro.config("rm", {"comparisons": f"jsonl:{tmp_path}/rows.jsonl"}, **changes)
  tokenizer = types.SimpleNamespace(
    eos_id=1,
    encode=lambda text: list(map(ord, text)),
    encode_prompt=lambda text: list(map(ord, text)),
  )
  tokenizer.render_chat = None
  data = run_data.RunData(config, tmp_path, tokenizer)
  ctx = types.SimpleNamespace(
    config=config, data=data, tokenizer=tokenizer, data_seed=lambda name: 0
  )
  made = []
  batches = types.SimpleNamespace(steps_per_epoch=10**6)
  monkeypatch.setattr(
    rm, "_batches", lambda ctx, rankings, seed: made.append(len(rankings)) or batches
  )
  rm.check(ctx, "rm")
  return made


def row(number, ranks=(1, 2), labeler="ann", response="a"):
  return {"prompt": f"p{number}", "responses": [response, "b"], "ranks": ranks, "labeler": labeler}


def test_what_has_nothing_to_learn_or_to_measure_is_found_before_training(tmp_path, monkeypatch):
  check = functools.partial(checked, tmp_path, monkeypatch, rm__cross_validation_folds=0)
  good = [row(i) for i in range(40)]
  (count,) = check(good)
  assert 20 < count < 40
  held_out = lambda i: sources._is_held_out(records.Prompt(f"p{i}"), 0.25)
  assert 0 < sum(map(held_out, range(40))) < 20
  for what, is_tie in (
    ("training", lambda i: True),
    ("training", lambda i: not held_out(i)),
    ("held-out", held_out),
  ):
    rows = [row(i, (2, 2) if is_tie(i) else (1, 2)) for i in range(40)]
    with pytest.raises(UserError, match=f"'jsonl:.*': none of the \\d+ {what} rankings has a pair"):
      check(rows)
  # An answer that is too long drops out, and with it the order.
  rows = [row(i, (1, 2), response="a" * 999) for i in range(40)]
  with pytest.raises(UserError, match="comparisons: every record is too long"):
    check(rows)
  with pytest.raises(UserError, match="a prompt has 40 ranked responses; raise rm.max_responses"):
    check([row(i) | {"responses": ["a"] * 40, "ranks": [*range(1, 41)]} for i in range(40)])


def test_every_fold_of_labelers_needs_an_order(tmp_path, monkeypatch):
  check = functools.partial(checked, tmp_path, monkeypatch, rm__cross_validation_folds=2)
  rows = [row(i, labeler=name) for i in range(40) for name in ("ann", "bob")]
  assert check(rows)
  tied = [r | {"ranks": [1, 1]} if r["labeler"] == "bob" else r for r in rows]
  with pytest.raises(
    UserError, match=r"rankings by the (other )?labelers of fold \d \(rm.cross_valid"
  ):
    check(tied)
