"""Times one supervised training step of GPT-2 small's shape, in tokens per second, beside those of other libraries.

  benchmarks/peers/setup.sh trl && python -m benchmarks.sft_step --peer=trl --repeats=5

The step trains on 8 rows of 256 tokens: 124,439,808 random float32 weights, Adam with clipped gradients, no dropout.
Ours is the step of the stages (`supervised.make_lm_train_step`). Each --set is a variant of ours (fields of the config,
separated by commas); the default is `execution.remat="none"`, as in the presets for a CPU. --peer may be given several
times. `flax` needs nothing else; `torch` and `trl` need the environment `.venv-trl` of benchmarks/peers/setup.sh.

Each program is a process of its own. All are in memory at once (ours and one peer took 13 GB) and run in turn on two
cores. All must have the same number of parameters, train on the same number of tokens and begin with the same loss
(within 0.1, since weights are random); otherwise the command ends.

Prints one JSON line for each program: tokens per second by the median of wall seconds, wall and CPU seconds with their
ranges, peak memory, the load by other processes during each run, and the bound. The bound is the time for every matrix
product of the model once, forward and backward, at the rate of a 2048 x 2048 product, plus the time for the bytes that
Adam must read and write, at the rate of a large matrix-vector product. Both rates are measured first. For each peer, a
last line has our medians over the peer's.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import machine, ppo_iteration, turns
from benchmarks.peers import worker
from configs import models
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch
from instructjax.models import flops, model_on, transformer
from instructjax.parallel import memory, sharding
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer

ROWS, LENGTH, VOCAB = 8, 256, 50257
PEERS = ppo_iteration.PEERS
PYTHON = {
  "flax": pathlib.Path(sys.executable),
  "torch": PEERS / ".venv-trl/bin/python",
  "trl": PEERS / ".venv-trl/bin/python",
}
DEFAULT = 'execution.remat="none"'


def make_config(spelling: str):
  """The preset gpt2 with the changes FIELD=VALUE,... of a --set."""
  config = models.get("sft", "gpt2")
  pairs = (pair.split("=") for pair in spelling.split(","))
  config.update_from_flattened_dict({name: json.loads(value) for name, value in pairs})
  return from_config_dict(config)


def packed_batch(token_BL: np.ndarray) -> PackedBatch:
  """A batch of rows without padding. Each row is one document, and every token is trained on."""
  position_BL = np.tile(np.arange(token_BL.shape[1], dtype=np.int32), (len(token_BL), 1))
  weight_BL = np.ones(token_BL.shape, np.float32)
  return PackedBatch(token_BL, np.ones_like(token_BL), position_BL, weight_BL)


def make_training(cfg, vocab_size: int, token_BL: np.ndarray) -> tuple[Callable[[], float], int]:
  """Makes our training step: (function that runs one step and returns its loss, number of parameters)."""
  mesh = sharding.make_mesh(cfg.mesh)
  jax.set_mesh(mesh)
  model = model_on(mesh, cfg.model.network, cfg.execution, vocab_size, "lm")
  tx = make_optimizer(cfg.sft.optim, num_steps=1000)
  params = supervised.init_params(mesh, model, jax.random.key(0))
  num_parameters = sum(x.size for x in jax.tree.leaves(params))
  state, shardings = supervised.create_state(mesh, model, tx, params, jax.random.key(1))
  step = supervised.make_lm_train_step(model, tx, dropout_rate=0.0, state_shardings=shardings)
  batch = sharding.place_batch(mesh, packed_batch(token_BL))

  def train() -> float:
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, batch))
    return float(metrics["loss"])

  return train, num_parameters


def serve(cfg, token_BL: np.ndarray):
  """Runs this process as our worker of `turns`, in the way of the peers' scripts."""
  train, num_parameters = make_training(cfg, VOCAB, token_BL)

  def once() -> dict:
    train()
    return {}

  first_loss = train()
  train()  # once more: only now does malloc hold all the memory that a step needs
  description = {"parameters": num_parameters, "tokens": token_BL.size, "first_loss": first_loss}
  worker.serve(once, description | {"libraries": f"jax {jax.__version__}"})


def bound_seconds(flops_rate: float, byte_rate: float) -> float:
  """The bound on a step's seconds: the products of one forward and one backward pass, and the bytes that Adam moves.

  Args:
    flops_rate: FLOPs per second of a large product.
    byte_rate: bytes per second of a large matrix-vector product.
  """
  cfg = make_config(DEFAULT)
  model = model_on(None, cfg.model.network, cfg.execution, VOCAB, "lm")
  # A backward pass costs two forward passes.
  products = 3 * flops.forward(model, ROWS * LENGTH, LENGTH, outputs=ROWS * (LENGTH - 1))
  parameters = sum(x.size for x in jax.tree.leaves(transformer.param_shapes(model)))
  return products / flops_rate + machine.UPDATE_BYTES * parameters / byte_rate


def check_same_work(found: dict[str, dict]):
  """Checks that all programs did the same work as the first.

  Raises:
    UserError: a program has another number of parameters or tokens, or starts with another loss.
  """
  (first, ours), *others = ((name, one["description"]) for name, one in found.items())
  for name, theirs in others:
    for key, tolerance in (("parameters", 0), ("tokens", 0), ("first_loss", 0.1)):
      if not abs(theirs[key] - ours[key]) <= tolerance:
        raise UserError(f"{name} does other work than {first}: {key} {theirs[key]}, {ours[key]}")


def commands(variants: list[str], peers: list[str], tokens: str) -> dict[str, list[str]]:
  """The commands that start the workers, by name.

  Args:
    variants: the --set of each variant of ours.
    peers: names of the peers.
    tokens: path of the file with the tokens, which all programs train on.
  Raises:
    UserError: a peer's environment does not exist.
  """
  ours = [sys.executable, "-m", "benchmarks.sft_step", f"--tokens={tokens}"]
  found = {spelling: [*ours, f"--worker={spelling}"] for spelling in variants}
  for peer in peers:
    if not PYTHON[peer].exists():
      raise UserError(f"--peer={peer} needs {PYTHON[peer]}; run benchmarks/peers/setup.sh trl")
    found[peer] = [str(PYTHON[peer]), str(PEERS / f"{peer}_sft.py"), f"--tokens={tokens}"]
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--set", action="append", metavar="FIELD=VALUE,...")
  parser.add_argument("--peer", action="append", choices=PYTHON, default=[])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  parser.add_argument("--tokens", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    worker.claim_stdout()
    memory.keep_freed_memory()
    serve(make_config(args.worker), np.load(args.tokens))
    return
  if sys.platform == "linux":  # the workers inherit these cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ppo_iteration.CORES])
  try:
    rates = machine.product_flops(), machine.read_rate()
    with tempfile.TemporaryDirectory() as folder:
      tokens = f"{folder}/tokens.npy"
      rng = np.random.default_rng(0)
      np.save(tokens, rng.integers(VOCAB, size=(ROWS, LENGTH)).astype(np.int32))
      found = turns.measure(commands(args.set or [DEFAULT], args.peer, tokens), args.repeats)
    check_same_work(found)
  except UserError as error:
    sys.exit(f"error: {error}")
  bound = bound_seconds(*rates)
  for name, result in found.items():
    wall = result["wall_s"]["median"]
    line = {
      "benchmark": "sft_step",
      "variant": name,
      "tokens_per_s": round(ROWS * LENGTH / wall, 1),
      "product_gflops": round(rates[0] / 1e9),
      "read_gb_s": round(rates[1] / 1e9, 1),
      "bound_s": round(bound, 2),
      "wall_over_bound": round(wall / bound, 2),
    }
    print(json.dumps(line | result))
  for peer in args.peer:
    ours = {name: found[name] for name in found if name not in args.peer or name == peer}
    ratios = ppo_iteration.ratios(ours, peer)
    print(json.dumps({"benchmark": "sft_step", f"over_{peer}": ratios}))


if __name__ == "__main__":
  main()
