"""About how long a run still takes: by hand, and in words."""

import json
import types

import pytest

from instructjax.core.stages import STAGES
from instructjax.data.records import Ranking
from instructjax.models import flops
from instructjax.stages import context, outlook
from tests import micro


@pytest.fixture
def ctx(tmp_path):
  """A run of `ppo_ptx` with 10 demonstrations and 6 rankings; answers have half of 36 + 24 tokens with their prompt."""
  config = micro.config("ppo_ptx", {"comparisons": "jsonl:c"})
  records = {"comparisons": [Ranking("p", ("a", "b"), (1, 2))] * 6}
  stored = types.SimpleNamespace(store=lambda: [None] * 10)
  return types.SimpleNamespace(
    config=config,
    data=types.SimpleNamespace(
      records=lambda kind, split: records[kind],
      tokens=lambda kind, split: stored,
      prompt_tokens=lambda split: [[1]] * 5,
    ),
    model=lambda role: context.make_model(config, None, role, micro.VOCAB_SIZE),
    directory=lambda stage: tmp_path / stage,
  )


def log(ctx, stage, *seconds):
  ctx.directory(stage).mkdir()
  rows = [json.dumps({"step": i, "seconds": s}) + "\n" for i, s in enumerate(seconds, start=1)]
  (ctx.directory(stage) / "metrics.jsonl").write_text("".join(rows))


def test_work_by_hand(ctx):
  policy = lambda tokens, length=30: flops.forward(ctx.model("policy"), tokens, length)
  reward = lambda tokens: flops.forward(ctx.model("reward"), tokens, 30)
  n = ctx.config.best_of_n.n
  expected = {
    "pretrain": 3 * policy(4 * 8 * 60, 60),
    "sft": 3 * 2 * policy(10 * 1.25 * 30),
    "rm": 3 * ctx.config.rm.num_epochs * reward(6 * 3 * 30),
    # 4 iterations of 8 episodes: sampled (3) and read again (1), twice scored, updated with as many rows of 60 tokens.
    "ppo_ptx": 4 * policy(960)
    + 2 * reward(960)
    + 3 * (policy(960) + reward(960) + policy(32 * 60)),
    "evaluate": 4 * policy(4 * 8 * 30) + reward(4 * 8 * 30),
    "best_of_n": 3 * policy(5 * n * 30) + reward(5 * n * 30),  # to all of 5 prompts
    "sft_select": 0,
  }
  assert {stage: outlook.work(ctx, stage) for stage in expected} == pytest.approx(expected)
  assert outlook.work(ctx, "ppo") < outlook.work(ctx, "ppo_ptx")  # it has no text of pretraining
  assert outlook.work(ctx, "collect") > 0


def test_an_evaluation_reads_the_answers_of_checkpoints_too(ctx):
  """Four policies and no checkpoint; then three of the one RL run."""
  before = outlook.work(ctx, "evaluate")
  ctx.config = micro.config("ppo_ptx", {"comparisons": "jsonl:c"}, evaluate__checkpoints=3)
  assert outlook.work(ctx, "evaluate") == pytest.approx(before * 7 / 4)


def test_every_kind_of_stage_has_its_work(ctx):
  for stage, row in STAGES.items():
    assert (outlook.work(ctx, stage) > 0) == (row.kind != "select"), stage


def test_the_coming_stages_take_their_work_at_the_speed_of_the_finished(ctx):
  assert outlook.seconds_left(ctx, ["sft"], []) is None
  log(ctx, "pretrain", 5.0, 1.0, 1.0, 1.0)
  speed = outlook.work(ctx, "pretrain") / 8.0
  coming = (outlook.work(ctx, "sft") + outlook.work(ctx, "ppo_ptx")) / speed
  left = lambda: outlook.seconds_left(ctx, ["sft", "ppo_ptx"], ["pretrain", "sft_select"])
  assert left() == pytest.approx(coming)
  log(ctx, "ppo_ptx", 1.0)  # a quarter of it was done by an earlier run
  assert left() == pytest.approx(coming - outlook.work(ctx, "ppo_ptx") / 4 / speed)


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(1, "10 s"), (44, "40 s"), (89, "90 s"), (95, "2 min"), (3500, "58 min"), (2.5 * 3600, "2.5 h")],
)
def test_words_are_as_coarse_as_the_estimate(seconds, text):
  assert outlook.words(seconds) == text
