"""Times a decode step of SmolLM2-135M on a CPU, beside the time to read its weights once and beside transformers.

  python -m benchmarks.decode
  benchmarks/peers/setup.sh trl && python -m benchmarks.decode --peer=transformers [--gguf=PATH]

Both programs sample in float32, at temperature 1 from the whole distribution, after prompts of 32 tokens, in batches of
1 and 16. Ours is `sampling.generate` in one compiled program, as in a rollout; theirs is `generate` of transformers, in
the virtual environment of TRL. The time of a step is that of 64 new tokens less that of 8, divided by 56, so that
prefill and start-up drop out. The two programs are processes that run in turn on two cores, so that a busy machine
slows both alike.

Prints one JSON line for each program:
  - medians of wall and CPU milliseconds, by batch;
  - for ours, the part of a step that drawing the token takes;
  - the floor: the bytes of the weights at the rate at which a large matrix-vector product reads, which is measured
    first;
  - the load by other processes during each run.
With the peer, a last line has our medians over the peer's. Weights are random, or those of a GGUF file of any model
(which transformers reads with the package `gguf`).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

from benchmarks import machine, turns
from benchmarks.peers import worker
from configs import models as presets
from instructjax.core.config import Config, MeshConfig, from_config_dict
from instructjax.core.errors import UserError
from instructjax.core.structs import PromptBatch
from instructjax.models import model_on, transformer
from instructjax.parallel import memory, sharding
from instructjax.rl import sampling
from instructjax.train import weights

PEERS = pathlib.Path(__file__).parent / "peers"
CORES = 2
BATCHES = 1, 16
PROMPT, FEW, MANY = 32, 8, 64  # tokens; a step is what MANY new ones take longer than FEW
VOCAB = 49152
NEVER = -1  # an EOS that is never drawn, so that no row ends early


def smollm2() -> Config:
  """The preset's config."""
  return from_config_dict(presets.get("ppo", "smollm2_135m"))


def open_model(gguf: str | None):
  """Makes the network with random weights, or with those of a GGUF file; returns (model, parameters).

  Raises:
    UserError: the file cannot be read.
  """
  if gguf:
    opened = weights.locate(gguf)
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    model = opened.model(mesh)
    return model, opened.load(mesh, model)
  config = smollm2()
  model = model_on(None, config.model.network, config.execution, VOCAB, "lm")
  return model, jax.jit(transformer.init_params, static_argnums=0)(model, jax.random.key(0))


def compile_rollout(model, params, batch: int, num_tokens: int):
  """Compiles a function without arguments that returns a Rollout of `num_tokens` tokens per row."""
  shape = batch, PROMPT
  prompts = PromptBatch(
    np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32),
    np.ones(shape, bool),
    np.arange(batch, dtype=np.int32),
  )

  def run(params, prompts, key):
    ends = dict(max_new_tokens=num_tokens, stop_ids=(NEVER,), temperature=1.0)
    return sampling.generate(model, params, prompts, key, **ends)

  args = params, prompts, jax.random.key(1)
  program = jax.jit(run).lower(*args).compile()
  return lambda: program(*args)


def compile_draws(batch: int, vocab_size: int, num_draws: int):
  """Compiles a function without arguments that draws `num_draws` tokens per row, one after another."""
  logits_BV = jax.random.normal(jax.random.key(0), (batch, vocab_size))
  uniform_B = jax.random.uniform(jax.random.key(1), (batch,))

  def run(logits_BV, uniform_B):
    def draw(_, logits_BV):
      _, logprob_B = sampling.sample_token(logits_BV, uniform_B, 1.0)
      # Makes each draw depend on the one before, so that XLA can neither drop draws nor run them at once.
      return logits_BV.at[:, 0].set(logprob_B)

    return jax.lax.fori_loop(0, num_draws, draw, logits_BV)

  program = jax.jit(run).lower(logits_BV, uniform_B).compile()
  return lambda: program(logits_BV, uniform_B)


def milliseconds(run) -> np.ndarray:
  """Runs once; returns (wall, CPU) milliseconds."""
  before = time.perf_counter(), time.process_time()
  jax.block_until_ready(run())
  return 1e3 * np.subtract((time.perf_counter(), time.process_time()), before)


def serve(gguf: str | None):
  """Runs this process as a worker of `turns`."""
  worker.claim_stdout()
  memory.keep_freed_memory()
  model, params = open_model(gguf)
  programs = {
    batch: [
      compile_rollout(model, params, batch, FEW),
      compile_rollout(model, params, batch, MANY),
      compile_draws(batch, model.vocab_size, MANY - FEW),
    ]
    for batch in BATCHES
  }

  def once() -> dict:
    found = {}
    for batch, runs in programs.items():
      few, many, draws = (milliseconds(run) for run in runs)
      for name, taken in (("step", many - few), ("draw", draws)):
        for kind, value in zip(("ms", "cpu_ms"), taken / (MANY - FEW)):
          found[f"batch_{batch}_{name}_{kind}"] = float(value)
    return found

  once()  # the first run takes fresh memory from the system
  parameters = sum(x.size for x in jax.tree.leaves(params))
  worker.serve(once, {"parameters": parameters, "jax": jax.__version__})


def peer_command(gguf: str | None) -> list[str]:
  """The command that starts transformers' worker.

  Raises:
    UserError: its virtual environment does not exist.
  """
  python = PEERS / ".venv-trl/bin/python"
  if not python.exists():
    raise UserError(f"--peer=transformers needs {python}; run benchmarks/peers/setup.sh trl")
  task = {
    "model": dataclasses.asdict(smollm2().model) | {"vocab_size": VOCAB},
    "gguf": gguf and str(pathlib.Path(gguf).absolute()),
    "batches": BATCHES,
    "tokens": (PROMPT, FEW, MANY),
  }
  return [str(python), str(PEERS / "decode_transformers.py"), json.dumps(task)]


def lines(found: dict[str, dict], rate: float, peer: str | None) -> list[dict]:
  """The lines to print: one for each program and, with a peer, one of our medians over the peer's.

  Raises:
    UserError: the two programs have different numbers of parameters.
  """
  result = []
  for name, values in found.items():
    floor = values["description"]["parameters"] * 4 / rate * 1e3
    result.append({"program": name, "read_gb_s": round(rate / 1e9, 1), "floor_ms": round(floor, 1)})
    result[-1] |= values
  if peer:
    ours, theirs = found["instructjax"], found[peer]
    sizes = [values["description"]["parameters"] for values in (ours, theirs)]
    if sizes[0] != sizes[1]:
      raise UserError(f"{peer} does other work: {sizes[1]} parameters, where ours are {sizes[0]}")
    ratios = {key: round(ours[key] / theirs[key], 3) for key in theirs if key.startswith("batch_")}
    result.append({f"over_{peer}": ratios})
  return result


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gguf", metavar="PATH", help="weights; default: random ones")
  parser.add_argument("--peer", choices=("transformers",))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    serve(args.gguf)
    return
  if sys.platform == "linux":  # the workers have the same cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  try:
    if args.gguf and not pathlib.Path(args.gguf).is_file():
      raise UserError(f"--gguf={args.gguf} must be a file, and there is none")
    ours = [sys.executable, "-m", "benchmarks.decode", "--worker"]
    commands = {"instructjax": ours + ([f"--gguf={args.gguf}"] if args.gguf else [])}
    if args.peer:
      commands[args.peer] = peer_command(args.gguf)
    rate = machine.read_rate()
    for line in lines(turns.measure(commands, args.repeats), rate, args.peer):
      print(json.dumps(line))
  except UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
