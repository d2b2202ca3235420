"""Measures what the reward model saves when answers share rows, and their prompt: a training step, by length of a row.

  python -m benchmarks.rm_rows --row_lengths=0,64,128 --repeats=30
  python -m benchmarks.rm_rows --row_lengths=64,128,128t

A `t` after a length has one copy of a prompt for the answers in a row, which is a tree (`rm.share_prompts`).

The network is the default preset's. Batches have 8 prompts with 4 to 6 answers each, of random tokens: prompts of 5 to
12 tokens and answers of 4 to 20, evenly spread, which is 20.5 together on average, as in a run. Row length 0 gives each
answer a row of its own. Steps of the different lengths take turns.

Prints one JSON line: for each length the rows of a batch, medians of its tokens and of a step's wall and CPU seconds
(all threads), and the losses of the first steps. Those are losses of the same batches and must agree.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from configs import models
from instructjax.core.config import from_config_dict
from instructjax.data import batching
from instructjax.data.tokenize import RankingTokens
from instructjax.models import model_on
from instructjax.parallel import memory, sharding
from instructjax.stages import rm
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer

SEED, RANKINGS = 0, 512


def random_rankings(config, vocab_size: int) -> list[RankingTokens]:
  """Rankings of random tokens, whose lengths are spread evenly up to the config's limits."""
  rng = np.random.default_rng(SEED)
  longest_prompt, longest = config.data.max_prompt_length, config.data.max_response_length
  draw = lambda low, high: rng.integers(0, vocab_size, rng.integers(low, high + 1)).tolist()

  def one():
    number = rng.integers(config.collect.min_responses, config.collect.max_responses + 1)
    responses = [draw(longest // 5, longest) for _ in range(number)]
    ranks = rng.permutation(number) + 1
    return RankingTokens(draw(5, longest_prompt), responses, ranks.tolist(), None)

  return [one() for _ in range(RANKINGS)]


class Variant:
  """A reward model in training, with rows of a given length.

  Attributes:
    shape: rows of a batch and their length.
    tokens: tokens of each batch so far, a shared prompt's once.
    wall, cpu: seconds of each step so far.
    losses: loss of each step so far.
  """

  def __init__(self, config, rows: str, mesh):
    cfg, data = config.rm, config.data
    row_length, is_tree = int(rows.rstrip("t")), rows.endswith("t")
    vocab_size = config.tokenizer.vocab_size
    network = config.reward_model.network
    model = model_on(mesh, network, config.execution, vocab_size, "scalar")
    tx, key = make_optimizer(cfg.optim, 1000), jax.random.key(SEED)
    params = supervised.init_params(mesh, model, key)
    self._state, shardings = supervised.create_state(mesh, model, tx, params, key)
    self._step, self._mesh = rm.make_train_step(model, tx, cfg, shardings), mesh
    rankings, num_rows = random_rankings(config, vocab_size), None
    length = row_length or data.max_prompt_length + data.max_response_length
    kwargs = dict(length=length, batch_size=cfg.batch_size, seed=SEED, share_prompts=is_tree)
    if row_length:
      num_rows = batching.rows_needed(rankings, num_epochs=1, **kwargs)
    self.shape = (num_rows or cfg.batch_size * cfg.max_responses, length)
    self._batches = batching.ranking_batches(
      rankings,
      max_responses=cfg.max_responses,
      vocab_size=vocab_size,
      num_rows=num_rows,
      **kwargs,
    )
    self.wall, self.cpu, self.losses, self.tokens = [], [], [], []

  def step(self):
    """Trains on the next batch and takes the time."""
    batch = sharding.place_batch(self._mesh, next(self._batches))
    start = time.perf_counter(), time.process_time()
    self._state, metrics = jax.block_until_ready(self._step(self._state, batch))
    self.wall.append(time.perf_counter() - start[0])
    self.cpu.append(time.process_time() - start[1])
    self.losses.append(float(metrics["loss"]))
    self.tokens.append(float(metrics["tokens"]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--row_lengths", default="0,64,128")
  parser.add_argument("--repeats", type=int, default=30)
  flags = parser.parse_args()
  config = from_config_dict(models.get("rm", None))
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    variants = {rows: Variant(config, rows, mesh) for rows in flags.row_lengths.split(",")}
    for _ in range(2 + flags.repeats):  # the first step compiles, the second warms up
      for variant in variants.values():
        variant.step()
  result = {
    rows: {
      "rows": variant.shape,
      "tokens": round(statistics.median(variant.tokens)),
      "wall_s": round(statistics.median(variant.wall[2:]), 4),
      "cpu_s": round(statistics.median(variant.cpu[2:]), 4),
      "losses": [round(loss, 5) for loss in variant.losses[:3]],
    }
    for rows, variant in variants.items()
  }
  print(json.dumps({"benchmark": "rm_rows", "repeats": flags.repeats, "row_lengths": result}))


if __name__ == "__main__":
  memory.keep_freed_memory()
  main()
