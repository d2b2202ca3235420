"""What it costs that the host computes a reward: the default preset's PPO-ptx iteration as one program, and split.

  python -m benchmarks.reward_split --repeats=20

Both maximise the reward model's score plus a rule about the answers' length, which the one program counts in tokens and
the split step gets from a function of (prompts, answers, answer_ids). The four networks have random weights, so that
answers are as long as they may be. The two run in turn in one process, so that a busy machine slows both alike.

Prints one JSON line: medians and quartiles of the seconds of an iteration, the seconds in which the host makes texts
and calls the function, and the largest difference of the policies' weights after all iterations.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from configs import models as presets
from instructjax.core import rewards
from instructjax.core.config import Config, from_config_dict
from instructjax.data import batching, sources, tokenize
from instructjax.data import tokenizer as tokenizers
from instructjax.parallel import sharding
from instructjax.rl import split
from instructjax.rl import step as ppo_step
from instructjax.stages import host_rewards, rl_nets
from instructjax.stages.reward_functions import Function
from instructjax.train import supervised

LIMIT = 16  # tokens; each above it costs a point
IN_PROGRAM = ("rm", f"0.02*length:-{LIMIT}")
ON_HOST = ("rm", "0.02*python:benchmark:length")


def too_long(prompts, answers, *, answer_ids):
  """The length rule as a function of the user's."""
  return [-max(len(ids) - LIMIT, 0) for ids in answer_ids]


def make_config(listed: tuple[str, ...]) -> Config:
  """The default preset with these rewards."""
  config = presets.get("ppo_ptx", "tiny")
  config.ppo.rewards = listed
  return from_config_dict(config)


def read_data(config: Config, folder: pathlib.Path):
  """(tokenizer, prompts as token ids) of the demo."""
  read = lambda kind: sources.load(
    "demo:", kind, "train", seed=0, validation_fraction=0.1, on_bad_record="raise"
  )
  texts = [document.text for document in read("documents")]
  tokenizer = tokenizers.train_tokenizer(
    texts, config.tokenizer.vocab_size, folder / "tokenizer.model", 0
  )
  limit = config.data.max_prompt_length
  return tokenizer, tokenize.tokenize_prompts(read("prompts"), tokenizer, max_prompt_length=limit)


class Side:
  """One of the two: its step and its state."""

  def __init__(self, listed: tuple[str, ...], tokenizer, prompts):
    config = make_config(listed)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    jax.set_mesh(mesh)
    cfg = config.ppo
    nets = rl_nets.make_nets(config, mesh, cfg, tokenizer.vocab_size, tokenizer.stop_ids)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [supervised.init_params(mesh, n, k) for n, k in zip((nets.policy, nets.scalar), keys)]
    self.state, shardings = rl_nets.initial_state(mesh, cfg, nets, *weights, keys[2])
    self._frozen = ppo_step.Frozen(*weights)
    self.host_seconds: list[float] = []
    (_, reward) = rewards.parse(listed, "rewards")
    if reward.on_host:
      functions = [Function(reward, too_long, asks=("answer_ids",))]
      on_host = self._timed(host_rewards.make("ppo", tokenizer, functions))
      self._step = split.make_split_step(nets, cfg, shardings, on_host)
    else:
      self._step = ppo_step.make_train_step(nets, cfg, shardings)
    self._batches = batching.prompt_batches(
      prompts, length=config.data.max_prompt_length, batch_size=cfg.batch_size, seed=0,
      vocab_size=tokenizer.vocab_size, places=np.arange(cfg.batch_size),
    )  # fmt: skip
    rows, length = cfg.batch_size * cfg.ptx_rows, cfg.ptx_length
    column = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    token = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (rows, length))
    text = ppo_step.PackedBatch(
      token.astype(np.int32), np.ones_like(column), column, (column > 0).astype(np.float32)
    )
    self._place = lambda batch: sharding.place_batch(mesh, {"prompts": batch, "pretrain": text})

  def _timed(self, on_host):
    def timed(rollout, iteration):
      jax.block_until_ready(rollout)  # which is the device's time
      start = time.perf_counter()
      found = on_host(rollout, iteration)
      self.host_seconds.append(time.perf_counter() - start)
      return found

    return timed

  def once(self) -> float:
    """Runs an iteration; returns its seconds."""
    batch = self._place(next(self._batches))
    start = time.perf_counter()
    self.state, *_ = jax.block_until_ready(self._step(self.state, self._frozen, batch))
    return time.perf_counter() - start


def summary(seconds: list[float]) -> dict[str, float]:
  low, middle, high = statistics.quantiles(seconds, n=4)
  return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def main(argv: list[str] | None = None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=20)
  repeats = parser.parse_args(argv).repeats
  with tempfile.TemporaryDirectory() as folder:
    data = read_data(make_config(IN_PROGRAM), pathlib.Path(folder))
    one, two = Side(IN_PROGRAM, *data), Side(ON_HOST, *data)
    for side in (one, two):  # compiles
      side.once()
    two.host_seconds.clear()
    times = [(one.once(), two.once()) for _ in range(repeats)]
  apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), one.state.params, two.state.params)
  result = {
    "one_program": summary([a for a, _ in times]),
    "split": summary([b for _, b in times]),
    "split_over_one": round(statistics.median(b / a for a, b in times), 4),
    "host": summary(two.host_seconds),
    "iterations": repeats + 1,
    "largest_difference_of_weights": max(jax.tree.leaves(apart)),
  }
  print(json.dumps(result))


if __name__ == "__main__":
  main()
