"""Supervised fine-tuning: what it trains on, what it is measured on, and which epoch is kept."""

import types
from unittest import mock

import numpy as np
import pytest

from instructjax.data.token_store import Encoded
from instructjax.stages import policies, sft
from instructjax.train import loop, saved_state, supervised
from tests import micro

EOS, PAD = 1, 55


def demonstration(number):
  return Encoded([number, number + 1, EOS], num_unweighted=1)


def rows(splits, *, cuts):
  """What RunData gives: (split, length) -> the sequences of a split in packed rows."""
  stores = {name: micro.in_memory(sequences, PAD) for name, sequences in splits.items()}
  return lambda split, length: stores[split].pack(length, PAD, splits=cuts)


def context(**changes):
  """Three training demonstrations of 10, 20 and 30, one held-out one of 40; text of 5 and 6."""
  demonstrations = {
    "train": [demonstration(n) for n in (10, 20, 30)],
    "validation": [demonstration(40)],
  }
  lengths = {f"{block}__length": 3 for block in ("sft", "ppo_init", "pretrain")}
  documents = {"train": [Encoded([5, 5, EOS])] * 3, "validation": [Encoded([6, 6, EOS])]}
  return types.SimpleNamespace(
    config=micro.config(
      "sft", {}, **dict(lengths, data__max_prompt_length=2, data__max_response_length=1), **changes
    ),
    tokenizer=types.SimpleNamespace(eos_id=EOS, vocab_size=PAD),
    data=types.SimpleNamespace(
      demonstration_rows=rows(demonstrations, cuts=False), document_rows=rows(documents, cuts=True)
    ),
    data_seed=lambda stage: 3,
    own_rows=np.arange,
    mesh="mesh",
    model=lambda role: f"{role} model",
    key=lambda stage: f"key of {stage}",
  )


def first_tokens(batch):
  return sorted(batch.token_BL[:, 0].tolist())


def test_a_batch_is_of_training_demonstrations_and_a_share_of_training_text():
  """A quarter of 8 rows. The epoch is one of the demonstrations: 3 in rows of 6 make one step."""
  ctx = context(sft__pretrain_mix=0.25)
  batches, steps_per_epoch = sft._batches(ctx, ctx.config.sft, "sft")
  rows = sft._join_rows(next(batches))
  assert first_tokens(rows) == [5, 5, 10, 10, 20, 20, 30, 30] and steps_per_epoch == 1
  assert rows.token_BL[-2:, 0].tolist() == [5, 5]  # the text comes last
  is_text_B = rows.token_BL[:, 0] == 5
  np.testing.assert_array_equal(rows.weight_BL[is_text_B], [[0, 1, 1]] * 2)
  np.testing.assert_array_equal(rows.weight_BL[~is_text_B], [[0, 1, 1]] * 6)  # answer and EOS
  ctx = context(sft__pretrain_mix=0.0, sft__batch_size=2)
  batches, steps_per_epoch = sft._batches(ctx, ctx.config.sft, "sft")
  seen = [first_tokens(sft._join_rows(next(batches))) for _ in range(3)]
  assert steps_per_epoch == 2 and sorted(sum(seen, [])) == [10, 10, 20, 20, 30, 30]


def test_it_is_measured_on_held_out_demonstrations_and_text():
  ctx = context(sft__microbatches=2, pretrain__microbatches=4)
  said = lambda params, batches: (
    params,
    {token for batch in batches for token in first_tokens(batch)},
  )
  made = lambda model, mesh, microbatches: lambda *a: (model, microbatches, *said(*a))
  with mock.patch.object(supervised, "make_lm_evaluation", made):
    evaluate = sft._validation_loss(ctx, ctx.config.sft, "model")
  losses = evaluate(types.SimpleNamespace(params="params"), 7)
  assert losses == {
    "loss": ("model", 2, "params", {40}),
    "pretrain_loss": ("model", 4, "params", {6}),
  }


@pytest.mark.parametrize(("stage", "kept"), [("sft", 4), ("ppo_init", 6)])
def test_the_baseline_keeps_its_best_epoch_and_ppo_starts_from_the_last(stage, kept):
  """Three epochs of two steps with losses 3, 1, 2."""
  changes = {f"{stage}__num_epochs": 3, f"{stage}__batch_size": 2, f"{stage}__pretrain_mix": 0.0}
  ctx = context(**changes)
  fitted, finished = {}, []
  history = {
    2 * n: {"metrics": {"validation/loss": loss, "validation/pretrain_loss": 10.0 * n}}
    for n, loss in ((1, 3.0), (2, 1.0), (3, 2.0))
  }
  fit = lambda run, state, step, batches, **kwargs: fitted.update(kwargs, state=state, step=step)
  patches = (
    mock.patch.object(
      sft, "stage_run", lambda ctx, *a, **k: types.SimpleNamespace(directory="dir")
    ),
    mock.patch.object(sft, "is_finished", lambda run: False),
    mock.patch.object(sft, "make_optimizer", lambda optim, num_steps: f"tx of {num_steps}"),
    mock.patch.object(sft, "finish", lambda ctx, *rest: finished.append(rest)),
    mock.patch.object(policies, "load", lambda ctx, name: f"weights of {name}"),
    mock.patch.object(supervised, "create_state", lambda *a: (a, "shardings")),
    mock.patch.object(supervised, "make_lm_train_step", lambda *a, **k: (a, k)),
    mock.patch.object(supervised, "make_lm_evaluation", lambda *a: a),
    mock.patch.object(loop, "fit", fit),
    mock.patch.object(saved_state, "read_meta", lambda directory, step: history[step]),
  )
  with patches[0], patches[1], patches[2], patches[3], patches[4], patches[5], patches[6]:
    with patches[7], patches[8], patches[9]:
      sft.run(ctx, stage)
  ends = (2, 4, 6)
  assert (fitted["num_steps"], fitted["evaluate_steps"], fitted["keep_steps"]) == (6, ends, ends)
  assert fitted["state"] == (
    "mesh", "policy model", "tx of 6", "weights of base", f"key of {stage}"
  )  # fmt: skip
  expected = dict(dropout_rate=0.1, state_shardings="shardings", microbatches=1)
  assert fitted["step"] == (("policy model", "tx of 6"), expected)
  with mock.patch.object(sft.flops, "training", lambda *a: a):
    assert fitted["flops"]({"tokens": 7}) == ("policy model", 7, 3)
  ((name, _, step, result),) = finished
  assert (name, step) == (stage, kept)
  assert [(e.step, e.validation_loss, e.pretrain_loss) for e in result.epochs] == [
    (2, 3.0, 10.0),
    (4, 1.0, 20.0),
    (6, 2.0, 30.0),
  ]


def test_the_schedule_is_checked_over_all_epochs():
  """Before anything is trained: three epochs of two steps."""
  ctx, checked = context(sft__num_epochs=3, sft__batch_size=2, sft__pretrain_mix=0.0), []
  with mock.patch.object(sft, "require_steps", lambda *a: checked.append(a)):
    sft.check(ctx, "sft")
  assert checked == [(ctx.config.sft.optim, 6, "config.sft.optim")]
