"""PPO iterations of tunix 0.1.7 as a worker of benchmarks.turns; in .venv-tunix, never instructjax.

  .venv-tunix/bin/python tunix_ppo.py '{"model": {...}, ...}'     a Workload of benchmarks.ppo_iteration

A repetition is what its PpoLearner.train() does from asking for one batch of prompts to asking for the next: for each
minibatch a rollout, scoring and the epochs' updates. tunix has no GPT-2, so the networks are its Qwen 2 with as many
weights in their products: the gated MLP's three matrices are two thirds as wide. Random weights, float32; nothing is
fetched. Its rewards are whole numbers (0.1.7 adds the scores to an integer array), so its value loss is no check.
"""

import contextlib
import dataclasses
import itertools
import json
import queue
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
import worker
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

Role = rl_cluster.Role
PAD = 0  # no prompt holds it; tunix, too, pads with EOS where a tokenizer has no pad


@dataclasses.dataclass(frozen=True)
class Ids:
  """What tunix wants of a tokenizer, for texts that are ids: "5 17 3"."""

  end: int

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))

  def bos_id(self):
    return None

  def eos_id(self) -> int:
    return self.end

  def pad_id(self) -> int:
    return PAD


def make_network(load: dict, seed: int, is_scalar: bool) -> nnx.Module:
  """A Qwen 2; its head shares the embedding's weights, or is one output (`is_scalar`)."""
  shape = load["model"]
  config = qwen2.ModelConfig(
    num_layers=shape["num_layers"],
    vocab_size=load["vocab_size"],
    embed_dim=shape["d_model"],
    hidden_dim=-(-shape["d_mlp"] * 2 // 3 // 16) * 16,  # 2048 of 3072; 688 of 1024
    num_heads=shape["num_heads"],
    head_dim=shape["head_dim"],
    num_kv_heads=shape["num_kv_heads"],
    rope_theta=10_000,
    norm_eps=1e-5,
    use_tied_embedding=True,
  )
  rngs = nnx.Rngs(seed)
  network = qwen2.Qwen2(config, rngs=rngs)
  # tunix's own embedding, of deviation 1, has the tied head repeat each token for ever: no answer would end.
  network.embedder.input_embedding[...] *= 0.005
  draw = nnx.initializers.normal(0.02)
  for layer in network.layers:  # tunix starts these at 0, and 0 has no gradients here
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
      linear.kernel[...] = draw(rngs.params(), linear.kernel.shape)
  if is_scalar:
    network.config = dataclasses.replace(config, use_tied_embedding=False)
    network.lm_head = nnx.Linear(shape["d_model"], 1, use_bias=False, rngs=rngs)
  return network


def make_learner(load: dict) -> ppo_learner.PpoLearner:
  """tunix's learner with the workload's shapes, and instructjax's rates where tunix has them."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=load["response"],
    max_prompt_length=load["prompt"],
    kv_cache_size=load["prompt"] + load["response"],
    temperature=1.0,
    top_p=1.0,
  )
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optax.adam(9e-6),
    critic_optimizer=optax.adam(9e-6),
    mini_batch_size=load["batch"] // load["minibatches"],
    eval_every_n_steps=10**9,
    max_steps=10**9,
  )
  cluster = rl_cluster.RLCluster(
    actor=make_network(load, 0, is_scalar=False),
    reference=make_network(load, 0, is_scalar=False),
    critic=make_network(load, 1, is_scalar=True),
    reward=make_network(load, 1, is_scalar=True),
    tokenizer=Ids(end=0 if load["ends"] else load["vocab_size"] + 1),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh={role: mesh for role in Role},
      training_config=training,
      rollout_config=rollout,
    ),
  )
  config = ppo_learner.PpoConfig(num_iterations=load["epochs"], beta=0.02, kl_method="kl")
  return ppo_learner.PpoLearner(cluster, config)


class Turns:
  """The data that train() reads in a thread of its own: the batch of prompts, each time `run` is called.

  A context, so that the threads which wait for more data end with the worker.
  """

  def __init__(self, train: Callable, prompts: list[str]):
    self._prompts, self._asked = prompts, queue.Queue()
    self._done = queue.Queue()  # None, or what train() raised
    threading.Thread(target=self._train, args=(train,)).start()
    self._wait()

  def _train(self, train: Callable):
    try:
      train(self)
    except BaseException as error:  # raised again where the worker's main thread waits
      self._done.put(error)

  def __iter__(self):
    self._done.put(None)
    while self._asked.get():
      yield {"prompts": list(self._prompts)}
      self._done.put(None)  # more is wanted, so that batch is over

  def _wait(self):
    error = self._done.get()
    if error is not None:
      raise error

  def run(self):
    self._asked.put(True)
    self._wait()

  def __enter__(self) -> "Turns":
    return self

  def __exit__(self, *_):
    self._asked.put(False)


def watch(learner: ppo_learner.PpoLearner) -> dict:
  """A dict of each phase's seconds and of tokens, which whoever empties it starts anew."""
  seen, cluster = {}, learner.rl_cluster
  rollout, seeds = cluster.cluster_config.rollout_config, itertools.count()

  @contextlib.contextmanager
  def timed(phase: str):
    start = time.perf_counter()
    yield
    seen[phase] = seen.get(phase, 0.0) + time.perf_counter() - start

  generate, experience = cluster.generate, learner._generate_and_compute_advantage
  update_actor, update_critic = cluster.update_actor, cluster.update_critic

  def watched_generate(*args, **kwargs):
    rollout.seed = next(seeds)  # tunix would take the same one for each minibatch
    with timed("rollout"):
      found = generate(*args, **kwargs)
    # tunix cuts the token off that ends an answer.
    lengths = [min(len(tokens) + 1, rollout.max_tokens_to_generate) for tokens in found.tokens]
    seen["response_tokens"] = seen.get("response_tokens", 0) + sum(lengths)
    seen["decoded_tokens"] = seen.get("decoded_tokens", 0) + max(lengths) * len(lengths)
    return found

  def watched_experience(*args, **kwargs):
    with timed("experience"):
      found = jax.block_until_ready(experience(*args, **kwargs))
    kl_BR = (found.old_per_token_logps - found.ref_per_token_logps) * found.completion_mask
    seen.setdefault("kl", float(kl_BR.sum(axis=1).mean()))  # of the first minibatch
    return found

  def watched_update(update, trainer):
    def run(*args):
      with timed("update"):
        update(*args)
        jax.block_until_ready(nnx.state(trainer.model))

    return run

  cluster.generate = watched_generate
  learner._generate_and_compute_advantage = watched_experience
  cluster.update_actor = watched_update(update_actor, cluster.actor_trainer)
  cluster.update_critic = watched_update(update_critic, cluster.critic_trainer)
  return seen


def serve(learner: ppo_learner.PpoLearner, turns: Turns, seen: dict):
  cluster = learner.rl_cluster

  def once() -> dict:
    seen.clear()
    updates = cluster.actor_trainer.train_steps
    turns.run()
    return {
      "phases": {
        "rollout": seen["rollout"],
        "scoring": seen["experience"] - seen["rollout"],
        "update": seen["update"],
      },
      "response_tokens": seen["response_tokens"],
      "decoded_tokens": seen["decoded_tokens"],
      "updates": cluster.actor_trainer.train_steps - updates,
    }

  once()
  history = cluster._rl_metrics_logger.get_metric_history
  count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  worker.serve(
    once,
    {
      "program": "tunix 0.1.7, Qwen 2 of the same size",
      "jax": jax.__version__,
      "policy_parameters": count(cluster.actor_trainer.model),
      "value_parameters": count(cluster.critic_trainer.model),
      "first": {
        "policy_loss": float(history("actor", "loss", "train")[0]),
        "value_loss": float(history("critic", "loss", "train")[0]),
        "kl": seen["kl"],
      },
    },
  )


def main():
  worker.claim_stdout()
  load = json.loads(sys.argv[1])
  learner = make_learner(load)
  seen = watch(learner)
  prompts = np.random.default_rng(0).integers(
    1, load["vocab_size"], (load["batch"], load["prompt"])
  )
  with Turns(learner.train, [" ".join(map(str, row)) for row in prompts]) as turns:
    serve(learner, turns, seen)


if __name__ == "__main__":
  main()
