"""The reward model's train step: eq. 1 through the model, in one forward, blind to padding."""

import dataclasses
import functools
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructjax import models
from instructjax.core import results
from instructjax.core.config import MeshConfig, RMConfig
from instructjax.core.errors import UserError
from instructjax.core.structs import RankedBatch, token_mask
from instructjax.data import records, sources
from instructjax.data.batching import ranked_batch
from instructjax.data.records import Ranking
from instructjax.data.tokenize import RankingTokens
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.stages import answers, rm, run_data
from instructjax.stages.contents import Contents
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer
from tests import micro, tiny
from tests.rl import episodes

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


def ranked(seed, shared=False, num_groups=1, share_prompts=False):
  length, num_rows = (3 * LENGTH, SHARED_ROWS * num_groups) if shared else (LENGTH, None)
  return ranked_batch(
    rankings(seed),
    max_responses=ANSWERS,
    length=length,
    vocab_size=VOCAB,
    num_rows=num_rows,
    num_groups=num_groups,
    share_prompts=share_prompts,
  )


@pytest.fixture(scope="module")
def model(tiny_config):
  return tiny.make_model(tiny_config, VOCAB, "scalar")


@pytest.fixture(scope="module")
def start(quick_jit, model, adam_config, random_params):
  """start(mesh) -> (train step, fresh state); one compiled step a mesh."""
  cfg = RMConfig(
    start_from="sft",
    weights="",
    num_epochs=1,
    batch_size=ROWS,
    microbatches=1,
    max_responses=ANSWERS,
    row_length=0,
    share_prompts=False,
    ties="drop",
    optim=adam_config,
    cross_validation_folds=0,
    cross_validation_prompts=1,
  )
  tx, steps = make_optimizer(adam_config, 100), {}

  def one(mesh, microbatches=1):
    placed = jax.device_put(random_params(model, 1), models.param_shardings(mesh, model)[0])
    with mock.patch.object(jax, "jit", quick_jit):
      state, shardings = supervised.create_state(mesh, model, tx, placed, jax.random.key(0))
      own = dataclasses.replace(cfg, microbatches=microbatches)
      kind = (mesh, microbatches)
      steps.setdefault(kind, rm.make_train_step(model, tx, own, shardings))
    return steps[kind], state

  return one


@pytest.fixture(scope="module")
def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


# --- what is measured on which records ------------------------------------------------------------


def test_the_bias_is_the_mean_score_of_whole_training_demonstrations():
  """They are read as the reward model sees complete answers: prompt, answer and EOS."""
  splits = {"train": [([2, 3], [4, 1]), ([5], [6, 7, 8, 1])], "validation": [([9], [9, 1])]}
  ctx = types.SimpleNamespace(
    config=micro.config("rm", {}),
    tokenizer=types.SimpleNamespace(stop_ids=(1,), pad_id=99, decode=str),
    data=types.SimpleNamespace(demonstration_tokens=splits.__getitem__),
    model=lambda role: role,
    given={},
  )

  def score(ctx, model, params, found):
    assert (model, params) == ("reward", "params")
    read = [row[mask].tolist() for row, mask in zip(found.token_NL, found.is_token_NL)]
    assert read == [[2, 3, 4, 1], [5, 6, 7, 8, 1]]
    return np.array([3.0, -1.0], np.float32)

  with mock.patch.object(answers, "score", score):
    assert rm.demonstration_mean(ctx, "params") == 1.0


SPLITS = ("train", "validation", "heldout")


def stage_context(records, **changes):
  """A context whose records are given by split."""
  return types.SimpleNamespace(
    config=micro.config("rm", {}, **changes),
    data=types.SimpleNamespace(rankings=lambda stage, split: records[split]),
    key=lambda name: f"key of {name}",
    given={},
    mesh="mesh",
    model=lambda role: role,
  )


@pytest.mark.parametrize("collects", [True, False])
def test_each_measurement_is_of_its_own_split(collects):
  """Trained on one, judged on two others; without simulated labelers there are no held-out ones."""
  records = {split: [split] for split in SPLITS}
  ctx = stage_context(records, data__comparisons="demo:" if collects else "jsonl:a")
  trained, kept = [], []
  train = lambda ctx, stage, name, rows, key: trained.append((name, rows, key)) or (7, "params")
  with (
    mock.patch.object(rm, "_stage_run", lambda ctx, stage, name: name),
    mock.patch.object(rm, "is_finished", lambda run: False),
    mock.patch.object(rm, "train", train),
    mock.patch.object(rm, "judge", lambda ctx, params, rows: (params, *rows)),
    mock.patch.object(rm, "demonstration_mean", lambda ctx, params: (params, "mean")),
    mock.patch.object(rm, "cross_validate", lambda ctx, stage: ("folds of", stage)),
    mock.patch.object(rm, "finish", lambda ctx, *rest: kept.append(rest)),
  ):
    rm.run(ctx, "rm")
  assert trained == [("rm", ["train"], "key of rm")]
  measured = results.RewardModel(
    demonstration_mean=("params", "mean"),
    validation=("params", "validation"),
    heldout_labelers=("params", "heldout") if collects else None,
    cross_validation=("folds of", "rm"),
  )
  assert kept == [("rm", "rm", 7, measured)]


@pytest.mark.parametrize("comparisons", ["jsonl:a", "demo:", ""])
@pytest.mark.parametrize("demonstrations", ["jsonl:b", ""])
def test_a_given_reward_model_is_measured_on_what_there_is(comparisons, demonstrations):
  """It is not trained, keeps no checkpoint, and what could not be measured is said."""
  records = {split: [split] for split in SPLITS}
  named = dict(data__comparisons=comparisons, data__demonstrations=demonstrations)
  ctx = stage_context(records, rm__weights="there", **named)
  load = lambda mesh, model: (mesh, model)
  ctx.given = {"rm": types.SimpleNamespace(path="there", load=load, end_of_score="at the EOS")}
  kept, said = [], []
  judged = results.Judgement(0.75, 0.1, 8, 4, 1.0, None)
  seen = []
  with (
    mock.patch.object(rm, "_stage_run", lambda ctx, stage, name: name),
    mock.patch.object(rm, "is_finished", lambda run: False),
    mock.patch.object(
      rm, "judge", lambda ctx, params, rows: seen.append((params, *rows)) or judged
    ),
    mock.patch.object(rm, "demonstration_mean", lambda ctx, params: 0.5),
    mock.patch.object(rm, "finish", lambda ctx, *rest: kept.append(rest)),
    mock.patch.object(rm.terminal, "say", said.append),
  ):
    rm.run(ctx, "rm")
  validation = judged if comparisons else None
  heldout = judged if comparisons == "demo:" else None
  mean = 0.5 if demonstrations else None
  assert kept == [("rm", "rm", None, results.RewardModel(mean, validation, heldout, ()))]
  splits = {"jsonl:a": ["validation"], "demo:": ["validation", "heldout"], "": []}[comparisons]
  assert seen == [(("mesh", "reward"), split) for split in splits]
  text = "\n".join(said)
  assert "rm there: a finished reward model, used as it is; at the EOS" in text
  assert ("accuracy 0.750 on 8 held-out pairs" in text) == bool(comparisons)
  assert ("is not measured" in text) == (not comparisons)
  assert ("demonstrations scored 0.5 on average" in text) == bool(demonstrations)
  assert ("keep the zero point of the file" in text) == (not demonstrations)


def test_cross_validation_trains_on_training_rankings_and_judges_on_held_out_ones():
  """Four labelers in two folds; `rm.cross_validation_prompts` limits what a fold trains on, not what judges it."""
  rank = lambda prompt, labeler: Ranking(prompt, ("a", "b"), (1, 2), labeler)
  records = {
    split: [rank(f"{split} {number}", labeler) for number in range(2) for labeler in "abcd"]
    for split in SPLITS
  }
  ctx = stage_context(records, rm__cross_validation_folds=2, rm__cross_validation_prompts=3)
  trained, seen = [], []
  names = lambda rows: [(row.prompt, row.labeler) for row in rows]

  def train(ctx, stage, name, rows, key):
    trained.append((stage, name, names(rows), key))
    return 1, f"params of {name}"

  def judge(ctx, params, rows):
    seen.append((params, names(rows)))
    return types.SimpleNamespace(accuracy=len(seen))

  with mock.patch.object(rm, "train", train), mock.patch.object(rm, "judge", judge):
    found = rm.cross_validate(ctx, "rm")
  assert rm.fold_labelers(ctx, "rm") == [{"a", "c"}, {"b", "d"}]
  first = [("train 0", "b"), ("train 0", "d"), ("train 1", "b")]
  second = [("train 0", "a"), ("train 0", "c"), ("train 1", "a")]
  assert trained == [
    ("rm", "rm/fold_0", first, "key of rm/fold_0"),
    ("rm", "rm/fold_1", second, "key of rm/fold_1"),
  ]
  held_out = lambda who: [(f"validation {number}", name) for number in range(2) for name in who]
  assert seen == [
    ("params of rm/fold_0", held_out("ac")),
    ("params of rm/fold_0", held_out("bd")),
    ("params of rm/fold_1", held_out("bd")),
    ("params of rm/fold_1", held_out("ac")),
  ]
  assert found == (results.Fold(heldout=1, train=2), results.Fold(heldout=3, train=4))


def test_folds_need_named_labelers_with_held_out_rankings():
  rank = lambda labeler: Ranking("p", ("a", "b"), (1, 2), labeler)
  everybody, one = [rank(name) for name in "abc"], [rank("a"), rank(None)]
  refused = "folds=2 must leave each fold a labeler with held-out rankings"
  for train, validation, count in ((everybody, one, 3), (one, everybody, 1)):
    ctx = stage_context(dict(train=train, validation=validation), rm__cross_validation_folds=2)
    with pytest.raises(UserError, match=rf"{refused}, and the comparisons name {count} labelers"):
      rm.fold_labelers(ctx, "rm")
  assert rm.fold_labelers(stage_context({}, rm__cross_validation_folds=0), "rm") == []
  # Folds are for the reward model of the first round.
  assert rm.fold_labelers(stage_context({}, rm__cross_validation_folds=2), "rm_2") == []


# --- what training and scoring are given ----------------------------------------------------------


@pytest.mark.parametrize(
  ("row_length", "microbatches", "length", "rows"),
  [(0, 1, 60, None), (70, 1, 70, 12), (70, 2, 70, 16)],
)
def test_batches_of_rankings(row_length, microbatches, length, rows):
  """A row for each of 8 * 3 answers of 36 + 24 tokens; shared ones are 11, rounded up to 4 shards of each part."""
  changes = {"rm__row_length": row_length, "rm__microbatches": microbatches}
  changes["rm__share_prompts"] = row_length > 0
  ctx = types.SimpleNamespace(
    config=micro.config("rm", {}, rm__num_epochs=2, **changes),
    tokenizer=micro.characters(),
    mesh="mesh",
    own_rows=lambda count: ("own", count),
    model=lambda role: types.SimpleNamespace(execution=tiny.EXECUTION),
  )
  asked = []
  with (
    mock.patch.object(sharding, "num_row_shards", {"mesh": 4}.__getitem__),
    mock.patch.object(rm.batching, "rows_needed", lambda *a, **k: asked.append((a, k)) or 11),
    mock.patch.object(rm.batching, "ranking_batches", lambda *a, **k: (a, k)),
  ):
    arguments, kwargs = rm._batches(ctx, ["tokens", "record"], 5)
  shape = dict(
    length=length, batch_size=8, seed=5, num_groups=microbatches, share_prompts=row_length > 0
  )
  assert arguments == (["tokens", "record"],)
  assert asked == ([((["tokens", "record"],), shape | dict(num_epochs=2))] if row_length else [])
  places = ("own", rows or 24), ("own", 8)
  assert kwargs == shape | dict(max_responses=3, vocab_size=98, num_rows=rows, places=places)


def test_training_takes_every_batch_of_every_epoch():
  ctx = types.SimpleNamespace(
    config=micro.config("rm", {}, rm__num_epochs=3),
    mesh="mesh",
    model=lambda role: f"{role} model",
    data_seed=lambda name: f"seed of {name}",
  )
  made = {}

  def batches(ctx, records, seed):
    made["batches"] = (records, seed)
    return types.SimpleNamespace(steps_per_epoch=5)

  def fit(run, state, step, batches, **kwargs):
    made["fit"] = (run, state, step, batches.steps_per_epoch, kwargs)
    return types.SimpleNamespace(params="trained")

  with (
    mock.patch.object(rm, "tokenized", lambda ctx, records: ["tokens", *records]),
    mock.patch.object(rm, "_batches", batches),
    mock.patch.object(rm, "_optimizer_and_step", lambda *a: made.update(tx=a) or ("tx", "step")),
    mock.patch.object(rm, "initial_params", lambda ctx, key: f"fresh by {key}"),
    mock.patch.object(supervised, "create_state", lambda *a: (a, None)),
    mock.patch.object(rm, "_stage_run", lambda ctx, stage, name: (stage, name)),
    mock.patch.object(rm.loop, "fit", fit),
    mock.patch.object(sharding, "place_batch", lambda mesh, batch: (mesh, batch)),
    mock.patch.object(rm.flops, "training", lambda model, tokens, length: (model, tokens, length)),
  ):
    assert rm.train(ctx, "rm", "rm/fold_1", ["record"], "key") == (15, "trained")
    run, state, step, _, kwargs = made["fit"]
    assert kwargs["num_steps"] == 15 and kwargs["place"]("batch") == ("mesh", "batch")
    assert kwargs["flops"]({"tokens": 7}) == ("reward model", 7, 60)
  assert made["batches"] == (["tokens", "record"], "seed of rm/fold_1")
  assert made["tx"] == ("reward model", ctx.config.rm, 15, "mesh")
  assert (run, step) == (("rm", "rm/fold_1"), "step")
  assert state == ("mesh", "reward model", "tx", "fresh by key", "key")


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_ties_are_treated_as_configured(model, adam_config, random_params, one_device, ties):
  """Traced only."""
  tx = make_optimizer(adam_config, 100)
  params = random_params(model, 1)
  state, shardings = supervised.create_state(one_device, model, tx, params, jax.random.key(0))
  asked = []

  def loss(score_BC, rank_BC, is_answer_BC, *, ties):
    asked.append(ties)
    return jnp.sum(score_BC), {"accuracy": jnp.float32(0)}

  with mock.patch.object(rm.preference, "ranked_preference_loss", loss):
    cfg = micro.config("rm", {}, rm__ties=ties).rm
    _, metrics = jax.eval_shape(rm.make_train_step(model, tx, cfg, shardings), state, ranked(0))
  assert asked == [ties] and {x.dtype for x in metrics.values()} == {np.dtype("float32")}


# --- the train step -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("num_devices", [1, 8])
def test_answers_that_share_their_prompt_give_the_same_loss_and_gradient(start, num_devices):
  """Each prompt is read once a row; its answers do not see each other."""
  mesh = sharding.make_mesh(MeshConfig(1, -1, 1, 1), jax.devices()[:num_devices])
  apart, together = ranked(0, shared=True), ranked(0, shared=True, share_prompts=True)
  assert np.sum(token_mask(together.segment_SL)) < 0.85 * np.sum(apart.segment_SL > 0)
  results = []
  for batch in (apart, together):
    step, state = start(mesh)
    state, metrics = step(state, sharding.place_batch(mesh, batch))
    del metrics["tokens"]
    results.append((metrics, jax.device_get(state.opt_state)))
  assert 0 < results[0][0]["loss"] and results[0][0]["grad_norm"] > 0.1
  for got, expected in zip(*map(jax.tree.leaves, results[::-1]), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "attention, wanted, shares",
  [("plain", True, True), ("splash", True, False), ("plain", False, False)],
)
def test_prompts_are_shared_where_attention_takes_trees(attention, wanted, shares):
  config = micro.config("rm", {}, rm__row_length=60, rm__share_prompts=wanted)
  execution = dataclasses.replace(tiny.EXECUTION, attention=attention)
  model = types.SimpleNamespace(execution=execution)
  assert rm.shares_prompts(config.rm, model) is shares


@pytest.mark.parametrize(
  "shared, microbatches, share_prompts", [(False, 8, False), (True, 2, False), (True, 2, True)]
)
def test_microbatches_are_one_batch(start, one_device, shared, microbatches, share_prompts):
  """Prompts of different K, among them prompts without a usable pair, with all their answers in one part."""
  whole, parts = (ranked(0, shared, number, share_prompts) for number in (1, microbatches))
  for batch in (whole, parts):
    batch.rank_BC[1] = batch.is_answer_BC[1]  # nothing but ties
  results = []
  for batch, number in ((whole, 1), (parts, microbatches)):
    step, state = start(one_device, number)
    state, metrics = step(state, batch)
    results.append((metrics, optax.tree.get(state.opt_state, "mu")))
  assert 0 < results[0][0]["accuracy"] < 1 and results[0][0]["grad_norm"] > 0.1
  (whole_metrics, whole_mu), (metrics, mu) = jax.device_get(results)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), metrics, whole_metrics)
  # The gradient of the head's bias is a sum that cancels: what is left of it is rounding.
  episodes.assert_same_gradient(mu, whole_mu)


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
  """Runs `rm.check`, with a character for a token; returns the numbers of rankings that it took for trainings."""
  micro.write_lines(tmp_path / "rows.jsonl", rows)
  config = micro.config("rm", {"comparisons": f"jsonl:{tmp_path}/rows.jsonl"}, **changes)
  tokenizer = types.SimpleNamespace(
    eos_id=1,
    encode=lambda text: list(map(ord, text)),
    bos_id=None,
    control_pattern=None,
    chats=types.SimpleNamespace(render_all=None),
  )
  data = run_data.RunData(config, tmp_path, tokenizer, Contents(config, tmp_path))
  ctx = types.SimpleNamespace(
    config=config, data=data, tokenizer=tokenizer, data_seed=lambda name: 0, given={}
  )
  trained = []
  monkeypatch.setattr(rm, "_require_steps", lambda cfg, number, what: trained.append(number))
  rm.check(ctx, "rm")
  return trained


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
  *folds, everything = check(rows)
  assert folds == [everything // 2] * 2
  assert check(rows, rm__cross_validation_prompts=3) == [3, 3, everything]
  tied = [r | {"ranks": [1, 1]} if r["labeler"] == "bob" else r for r in rows]
  with pytest.raises(
    UserError, match=r"rankings by the (other )?labelers of fold \d \(rm.cross_valid"
  ):
    check(tied)


@pytest.mark.parametrize(
  ("warmup", "folds", "what"),
  [
    (5, 0, "the 5 updates of the stage"),
    (3, 2, r"the 3 updates of a fold \(rm.cross_validation_f"),
  ],
)
def test_a_warmup_as_long_as_the_training_on_collected_rankings(warmup, folds, what):
  """Of the config alone, before the stages that the reward model needs: 9 rankings, of which a fold has 6."""
  make = functools.partial(
    micro.config, "rm", {}, collect__num_prompts=9, rm__batch_size=2, rm__num_epochs=1,
    rm__cross_validation_folds=folds, rm__cross_validation_prompts=6,
  )  # fmt: skip
  collected = functools.partial(make, data__comparisons="demo:", data__prompts="demo:")
  rm.check_settings(collected(rm__optim__warmup_steps=warmup - 1), "rm")
  message = f"config.rm.optim.warmup_steps={warmup} must be below {what}"
  with pytest.raises(UserError, match=message):
    rm.check_settings(collected(rm__optim__warmup_steps=warmup), "rm")
  # Of one's own rankings the config does not say how many there are.
  rm.check_settings(make(rm__optim__warmup_steps=warmup, data__comparisons="jsonl:x"), "rm")
