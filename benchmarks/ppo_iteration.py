"""Times one PPO iteration on a CPU, beside the time that its matrix products must take and beside another trainer.

  python -m benchmarks.ppo_iteration --workload=W3 --set=ppo.packed_rows=0 --set=ppo.packed_rows=1,rollout.slots=16
  benchmarks/peers/setup.sh trl && python -m benchmarks.ppo_iteration --workload=W2 --peer=trl

Each --set is a variant of ours (fields of the config, separated by commas); adapter.rank=16 trains adapters, and all
four networks then share one base. ppo.advantage=rloo or grpo needs no value network; there are four answers to a prompt
then, unless ppo.samples_per_prompt says otherwise. The peer is TRL 1.12's PPO, the last that TRL had, or that of tunix
0.1.7. Variants and peer are processes that run in turn on two cores, so that a busy machine slows all of them alike;
all are in memory at once. The four networks have random weights.

Prints one JSON line for each: medians and ranges of wall and CPU seconds, peak memory (iteration_rss_gb: without
compiling, which a warm cache saves), tokens sampled and decoded, the load by other processes during each run, and the
bound. The bound is the time for every matrix product that the algorithm needs, each once and for real tokens only, at
the rate of a 2048 x 2048 product, plus the time for the bytes that Adam must read and write, at the rate of a large
matrix-vector product. Both rates are measured first. With a peer, a last line has our medians over the peer's.

  W1: GPT-2 small's shape, 16 prompts of 32 tokens, 32 sampled, 1 epoch of 2 minibatches
  W2: 4 layers of width 256, vocabulary 512, 64 prompts of 16 tokens, 32 sampled, 4 epochs of 4 minibatches
  W3: W2's model with vocabulary 64, one of which ends an answer: up to 512 tokens, about 64 on average; 1 epoch
  135M: W1 with SmolLM2-135M's shape; no peer has it
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

import jax
import numpy as np

from benchmarks import machine, turns
from benchmarks.peers import worker
from configs import base
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from instructjax.core.structs import PromptBatch
from instructjax.models import adapters, model_on
from instructjax.parallel import memory, sharding
from instructjax.rl import step as ppo_step
from instructjax.stages import rl_nets
from instructjax.stages.context import bare
from instructjax.train import supervised

PEERS = pathlib.Path(__file__).parent / "peers"
CORES = 2
MAX_LENGTH = 2048  # of the networks' learned positions

_GPT2 = dict(num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64, d_mlp=3072)
_SMALL = dict(num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_mlp=1024)
_SMOLLM2 = dict(num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_mlp=1536)
_SMOLLM2 |= dict(position="rope", norm="rmsnorm", norm_eps=1e-5, mlp="swiglu", use_bias=False)


@dataclasses.dataclass(frozen=True)
class Workload:
  """The shapes of one iteration."""

  model: dict
  vocab_size: int
  prompt: int  # tokens of each prompt
  response: int  # most tokens of an answer
  batch: int  # prompts in an iteration
  minibatches: int
  epochs: int
  ends: bool  # whether id 0 ends an answer; otherwise every answer has `response` tokens


WORKLOADS = {
  "W1": Workload(_GPT2, 50257, 32, 32, 16, 2, 1, ends=False),
  "W2": Workload(_SMALL, 512, 16, 32, 64, 4, 4, ends=False),
  "W3": Workload(_SMALL, 64, 16, 512, 64, 4, 1, ends=True),
  "135M": Workload(_SMOLLM2, 49152, 32, 32, 16, 2, 1, ends=False),
}


def make_config(load: Workload, changes: dict):
  """The paper's config in float32, with the workload's shapes and then with `changes` (dotted field -> value)."""
  config = base.base("ppo")
  network = load.model | dict(max_length=MAX_LENGTH, attention_window=0)
  config.model.update(network)
  config.reward_model.update(network)
  config.execution.update(dtype="float32", remat="none")
  config.tokenizer.vocab_size = load.vocab_size
  config.data.update(max_prompt_length=load.prompt, max_response_length=load.response)
  config.ppo.update(
    batch_size=load.batch,
    num_minibatches=load.minibatches,
    num_epochs=load.epochs,
    behaviour_logprob="rollout",  # no second pass over the rollout; the bound counts none
    gamma=0.0,  # no pretraining mix
  )
  config.update_from_flattened_dict(changes)
  if config.ppo.advantage != "gae" and "ppo.samples_per_prompt" not in changes:
    config.ppo.samples_per_prompt = config.evaluate.group_size
  return from_config_dict(config)


def bound_flops(
  load: Workload,
  prompt_tokens: int,
  response_tokens: int,
  is_adapted: bool = False,
  has_value_network: bool = True,
) -> dict[str, float]:
  """FLOPs of the matrix products that an iteration needs, each counted once; those of attention are left out.

  Args:
    load: the workload.
    prompt_tokens, response_tokens: real tokens of all episodes.
    is_adapted: whether the weights are frozen, so that they have no gradients; adapters' own products are left out.
    has_value_network: whether there is one.
  Returns:
    FLOPs by part of the iteration.
  """
  model = load.model
  d, heads = model["d_model"], model["num_heads"] + model["num_kv_heads"]
  mlp = (3 if model.get("mlp") == "swiglu" else 2) * model["d_mlp"]
  layer = d * (2 * heads * model["head_dim"] + mlp)
  body = 2 * model["num_layers"] * layer * (prompt_tokens + response_tokens)
  head = 2 * d * load.vocab_size * response_tokens
  passes = 2 if is_adapted else 3  # forward, gradient of the inputs, gradient of the weights
  return {
    "rollout": body + head,
    # reference, reward, value; the policy's come with the rollout
    "scoring": (2 + has_value_network) * body + head,
    "update": passes * load.epochs * ((1 + has_value_network) * body + head),
  }


def parameter_counts(load: Workload, config) -> dict[str, int]:
  """Numbers of parameters of the networks that learn: the policy and, if there is one, the value network."""
  networks = {"policy": (config.model, "lm")}
  if config.ppo.has_value_network:
    networks["value"] = (config.reward_model, "scalar")
  counts = {}
  for name, (cfg, head) in networks.items():
    adapter = config.adapter if config.adapter.rank else None
    model = model_on(None, cfg.network, config.execution, load.vocab_size, head, adapter)
    shapes = adapters.trained_shapes(model)
    counts[name] = sum(x.size for x in jax.tree.leaves(shapes))
  return counts


def update_bytes(load: Workload, changes: dict) -> int:
  """The bytes that Adam moves in all updates of an iteration, with `changes` to the config."""
  parameters = sum(parameter_counts(load, make_config(load, changes)).values())
  return load.epochs * load.minibatches * machine.UPDATE_BYTES * parameters


def prepare(load: Workload, changes: dict):
  """Makes a function that runs one iteration and returns (metrics, samples).

  Args:
    load: the workload.
    changes: dotted config field -> value.
  Raises:
    UserError: a change does not fit the config.
  """
  config = make_config(load, changes)
  mesh = sharding.make_mesh(config.mesh)
  jax.set_mesh(mesh)
  # Without an end, EOS is an id that the vocabulary does not have, so that it is never drawn.
  cfg, stop_ids = config.ppo, (0 if load.ends else load.vocab_size + 1,)
  nets = rl_nets.make_nets(config, mesh, cfg, load.vocab_size, stop_ids)
  keys = jax.random.split(jax.random.key(0), 3)
  frozen = ppo_step.Frozen(
    supervised.init_params(mesh, nets.policy, keys[0]),
    supervised.init_params(mesh, nets.scalar, keys[1]),
  )
  if nets.policy.adapter:
    base = supervised.init_params(mesh, bare(nets.policy), keys[2])
    frozen = dataclasses.replace(frozen, base=base)
  state, shardings = rl_nets.initial_state(
    mesh,
    cfg,
    nets,
    frozen.ref_params,
    frozen.reward_params if cfg.has_value_network else None,
    keys[2],
  )
  step = ppo_step.make_train_step(nets, cfg, shardings)
  rng = np.random.default_rng(0)
  # Answers to a prompt stand in a row.
  shape = (load.batch // cfg.samples_per_prompt, load.prompt)
  token_BP = rng.integers(1, load.vocab_size, shape).repeat(cfg.samples_per_prompt, axis=0)
  prompts = PromptBatch(
    token_BP.astype(np.int32),
    np.ones(token_BP.shape, bool),
    np.arange(load.batch, dtype=np.int32),
  )
  batch = sharding.place_batch(mesh, {"prompts": prompts})

  def once():
    nonlocal state
    state, metrics, samples = step(state, frozen, batch)
    return jax.block_until_ready((metrics, samples))

  return once


def serve(load: Workload, changes: dict):
  """Runs this process as a worker of `turns`, for one variant."""
  worker.claim_stdout()
  memory.keep_freed_memory()
  jax.monitoring.register_event_duration_secs_listener(memory.release_after_compiling)
  once = prepare(load, changes)

  def repetition() -> dict:
    metrics, _ = once()
    response = float(metrics["tokens"])
    return {
      "response_tokens": round(response),
      "decoded_tokens": round(response / (1 - float(metrics["slot_waste"]))),
      "peak_rss_gb": max(compiling, worker.peak_rss_gb()),
      "iteration_rss_gb": worker.peak_rss_gb(),
    }

  metrics, _ = once()
  compiling = worker.peak_rss_gb()
  worker.forget_peak()
  first = {
    name: float(metrics[name]) for name in ("policy_loss", "value_loss", "kl") if name in metrics
  }
  config = make_config(load, changes)
  counts = parameter_counts(load, config)
  description = {f"{name}_parameters": count for name, count in counts.items()}
  first["ratio"] = float(metrics["ratio_mean"])
  worker.serve(repetition, description | {"jax": jax.__version__, "first": first})


def peer_command(peer: str, load: Workload) -> list[str]:
  """The command that starts a peer's worker.

  Raises:
    UserError: its virtual environment does not exist, or the peer has no network of this shape.
  """
  if load.model is _SMOLLM2:
    raise UserError(f"--peer={peer} has no network of this workload's shape; take W1, W2 or W3")
  python = PEERS / f".venv-{peer}/bin/python"
  if not python.exists():
    raise UserError(f"--peer={peer} needs {python}; run benchmarks/peers/setup.sh {peer}")
  shape = dataclasses.asdict(load) | {"max_length": MAX_LENGTH}
  return [str(python), str(PEERS / f"{peer}_ppo.py"), json.dumps(shape)]


def check_same_work(load: Workload, found: dict[str, dict]):
  """Checks that every program sampled as many tokens and made as many updates as the workload asks for.

  Raises:
    UserError: a program did not.
  """
  wanted = {"updates": load.epochs * load.minibatches}
  if not load.ends:
    wanted["response_tokens"] = load.batch * load.response
  for name, result in found.items():
    for key, value in wanted.items():
      # Ours does not report its updates: their number is fixed by the length of a scan.
      if result.get(key, value) != value:
        raise UserError(f"{name} does other work: {key} {result[key]}, where {value} are due")


def ratios(found: dict[str, dict], peer: str) -> dict[str, dict]:
  """Our medians divided by the peer's, by variant; without those that have no value network, which the peer has."""
  over = lambda ours, key: round(ours[key]["median"] / found[peer][key]["median"], 3)
  return {
    name: {key: over(ours, key) for key in ("wall_s", "cpu_s")}
    for name, ours in found.items()
    if name != peer and changes_of(name).get("ppo.advantage", "gae") == "gae"
  }


def changes_of(variant: str) -> dict:
  """Dotted config field -> value, of FIELD=VALUE,...; a value that is no JSON is a word."""

  def value(text: str):
    try:
      return json.loads(text)
    except ValueError:
      return text

  pairs = (pair.split("=") for pair in variant.split(","))
  return {name: value(text) for name, text in pairs}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workload", choices=WORKLOADS, required=True)
  parser.add_argument("--set", action="append", metavar="FIELD=VALUE,...", default=None)
  parser.add_argument("--peer", choices=("trl", "tunix"))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--worker", metavar="FIELD=VALUE,...", help=argparse.SUPPRESS)
  args = parser.parse_args()
  load = WORKLOADS[args.workload]
  if args.worker:
    serve(load, changes_of(args.worker))
    return
  if sys.platform == "linux":  # the workers inherit these cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  try:
    ours = [sys.executable, "-m", "benchmarks.ppo_iteration", f"--workload={args.workload}"]
    commands = {name: [*ours, f"--worker={name}"] for name in args.set or ["ppo.packed_rows=0"]}
    if args.peer:
      commands[args.peer] = peer_command(args.peer, load)
    flops_rate, byte_rate = machine.product_flops(), machine.read_rate()
    found = turns.measure(commands, args.repeats)
    check_same_work(load, found)
  except UserError as error:
    sys.exit(f"error: {error}")
  for name, result in found.items():
    changes = {} if name == args.peer else changes_of(name)
    config = make_config(load, changes)
    tokens = load.batch * load.prompt, result["response_tokens"]
    flops = bound_flops(load, *tokens, config.adapter.rank > 0, config.ppo.has_value_network)
    products = sum(flops.values()) / flops_rate
    bound = products + update_bytes(load, changes) / byte_rate
    line = {
      "workload": args.workload,
      "variant": name,
      "product_gflops": round(flops_rate / 1e9),
      "read_gb_s": round(byte_rate / 1e9, 1),
      "products_s": round(products, 2),
      "bound_s": round(bound, 2),
      "wall_over_bound": round(result["wall_s"]["median"] / bound, 2),
    }
    print(json.dumps(line | result))
  if args.peer:
    print(json.dumps({"workload": args.workload, f"over_{args.peer}": ratios(found, args.peer)}))


if __name__ == "__main__":
  main()
