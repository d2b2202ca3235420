"""Collects comparisons: samples K answers to each prompt from a policy, and has labelers rank them.

The answers of the first round are the SFT policy's. In later rounds (`collect.rounds`) they are those of the newest
PPO-ptx policy, as a few of the paper's were (sec 3.1). Simulated labelers rank them if `data.comparisons` is a
simulated task, as `demo:`. If it is a labeling project, `labels:DIR`, its rankings are the first round, and its people
rank the answers of later ones, see people.py. The stage writes ranking files in the format of a user's own comparisons,
which the reward model then reads:
  - `collect/train.jsonl`: training prompts, ranked by the training labelers;
  - `collect/validation.jsonl`: held-out prompts, ranked by the same labelers;
  - `collect/heldout.jsonl`: the same answers as in validation.jsonl, ranked by held-out labelers.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from instructjax.core import results
from instructjax.core.config import Config
from instructjax.core.errors import UserError, writing
from instructjax.core.stages import STAGES
from instructjax.core.structs import Params
from instructjax.data.tokenizer import prompt_ids
from instructjax.stages import answers, contents, judging, lineage, people, policies
from instructjax.stages.context import Context, finish, is_finished, stage_run

# A labeler's noise goes by the number of the ranking; those of a later round begin so much further on.
_ROUND = 10**6


def _speaker(ctx: Context, stage: str) -> Params:
  """The weights of the policy that answers."""
  (parent,) = STAGES[stage].parents
  if STAGES[parent].is_rl:
    return policies.load(ctx, STAGES[parent].require_policy().name)
  return policies.load_sft_by_loss(ctx)


def _sampled(
  ctx: Context, stage: str, split: str, prompts: list, num_prompts: int
) -> list[tuple[str, list[str]]]:
  """Draws `num_prompts` prompts and samples K answers to each: [(prompt text, answers)].

  If more prompts are asked for than there are, they are gone through several times, each time in a new order.
  """
  cfg = ctx.config.collect
  # The length of the split's name is part of the seed, so that the two splits draw differently.
  rng = np.random.default_rng([ctx.data_seed(stage), len(split)])
  passes = -(-num_prompts // len(prompts))
  order = np.concatenate([rng.permutation(len(prompts)) for _ in range(passes)])[:num_prompts]
  counts = rng.integers(cfg.min_responses, cfg.max_responses + 1, num_prompts)
  tokens = [
    prompt_ids(ctx.tokenizer, prompts[i].prompt) for i, k in zip(order, counts) for _ in range(k)
  ]
  key = ctx.key(f"{stage}/{split}")
  sampled = answers.sample(
    ctx,
    ctx.model("policy"),
    _speaker(ctx, stage),
    tokens,
    key,
    temperature=cfg.temperature,
  )
  ends = np.cumsum(counts)
  return [
    (prompts[i].prompt, sampled.text[end - k : end]) for i, k, end in zip(order, counts, ends)
  ]


def _write(path: pathlib.Path, rankings: list):
  """Writes rankings as JSON lines.

  Raises:
    UserError: the file cannot be written.
  """
  with writing(path), open(path, "w", encoding="utf-8") as file:
    for ranking in rankings:
      row = dataclasses.asdict(ranking)
      del row["where"]  # of no ranking that was not read from a file
      file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check_settings(config: Config, stage: str):
  """Checks that simulated labelers know the prompts, and that a reward model is trained on what is ranked.

  Raises:
    UserError: they are not, or the reward model is given although more rounds are to be collected for it.
  """
  given = lineage.given(config, "rm")
  if given and STAGES[stage].round > 1:
    raise UserError(
      f"config.collect.rounds={config.collect.rounds} must be 1 beside the finished reward model {given!r}, which no"
      " further comparisons would change"
    )
  if not lineage.collects(config):
    people.check_settings(config)
  prompts, comparisons = config.data.prompts, config.data.comparisons
  if lineage.collects(config) and prompts != comparisons:
    raise UserError(
      f"config.data.comparisons={comparisons!r} are collected on that task's own prompts, and config.data.prompts="
      f"{prompts!r}; give comparisons of your own, as jsonl:PATH"
    )


def check(ctx: Context, stage: str):
  """Checks that people can be asked, where they are to rank.

  Raises:
    UserError: the project cannot be opened.
  """
  if not lineage.collects(ctx.config):
    people.check(ctx)


def run(ctx: Context, stage: str):
  """Samples answers, has them ranked, and measures how often simulated labelers agree.

  Raises:
    Waiting: people have to rank them first.
    UserError: the stage is finished already, but was made with other settings; or the rankings cannot be written.
    Preempted: the run was told to stop.
  """
  cfg, seed = ctx.config.collect, ctx.config.seed
  run_ = stage_run(ctx, stage)
  if is_finished(run_):
    return
  if not lineage.collects(ctx.config):
    people.collect(ctx, stage, run_, functools.partial(_sampled, ctx, stage))
    return
  simulation = judging.require_simulation(ctx)
  train = _sampled(ctx, stage, "train", ctx.data.records("prompts", "train"), cfg.num_prompts)
  held_out = _sampled(
    ctx, stage, "validation", ctx.data.records("prompts", "validation"), cfg.num_heldout_prompts
  )
  if jax.process_index() != 0:  # sampling took all processes; one of them writes
    return
  directory = ctx.directory(stage)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  first = _ROUND * (STAGES[stage].round - 1)
  ranked = lambda answered, group: simulation.collect_rankings(answered, group, seed, first)
  _write(directory / "train.jsonl", ranked(train, "train"))
  _write(directory / "validation.jsonl", ranked(held_out, "train"))
  # The same answers once more: the two groups' accuracies differ by the labelers alone (sec 4.1).
  _write(directory / "heldout.jsonl", ranked(held_out, "heldout"))
  agree = lambda group: results.Agreement(**simulation.labeler_agreement(held_out, group, seed))
  digests = ctx.contents.of_written(stage).digests
  result = results.Collected(
    results.LabelerGroups(train=agree("train"), heldout=agree("heldout")),
    dict(zip(contents.SPLITS, digests, strict=True)),
  )
  finish(ctx, stage, run_, None, result)
