"""PPO iterations of TRL 1.12 (the last TRL with PPO) as a worker of benchmarks.turns; in .venv-trl, never instructjax.

  .venv-trl/bin/python trl_ppo.py '{"model": {...}, ...}'     a Workload of benchmarks.ppo_iteration

One call of its PPOTrainer.train() makes all iterations, and a repetition is one of them: its own code, from prompts to
optimiser steps. Its gradients are clipped as instructjax's are, which TRL's PPO does not do itself. Random weights,
float32, two threads; nothing is fetched. Where answers end, transformers' generate stops with the longest one, and TRL
scores and trains every row at that length: `decoded_tokens` says it.
"""

import json
import sys
import tempfile
import time
import types

import gate
import numpy as np
import torch
import transformers
import worker
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

THREADS = 2
ITERATIONS = 10**6  # more than will ever be asked for
CLIP_NORM = 1.0  # of each network's gradient, as in instructjax


def make_trainer(load: dict, folder: str, callback: gate.Gate) -> PPOTrainer:
  """TRL's trainer with the workload's shapes, and instructjax's rates where TRL has them."""
  shape, vocab_size = load["model"], load["vocab_size"]
  config = transformers.GPT2Config(
    vocab_size=vocab_size,
    n_positions=load["max_length"],
    n_embd=shape["d_model"],
    n_layer=shape["num_layers"],
    n_head=shape["num_heads"],
    n_inner=shape["d_mlp"],
    num_labels=1,
    bos_token_id=None,
    eos_token_id=None,
  )
  torch.manual_seed(0)
  policy, ref = (transformers.GPT2LMHeadModel(config) for _ in range(2))
  value, reward = (transformers.GPT2ForSequenceClassification(config) for _ in range(2))
  torch.nn.init.normal_(reward.score.weight, std=(shape["d_model"] + 1) ** -0.5)  # as instructjax's
  ref.load_state_dict(policy.state_dict())
  value.load_state_dict(reward.state_dict())
  prompts = np.random.default_rng(0).integers(1, vocab_size, (load["batch"], load["prompt"]))
  args = PPOConfig(
    output_dir=folder,
    total_episodes=ITERATIONS * load["batch"],
    per_device_train_batch_size=load["batch"],  # with gradient_accumulation_steps=1, each
    gradient_accumulation_steps=1,  # minibatch is one optimiser step
    num_mini_batches=load["minibatches"],
    num_ppo_epochs=load["epochs"],
    local_rollout_forward_batch_size=load["batch"],
    response_length=load["response"],
    stop_token="eos" if load["ends"] else None,
    temperature=1.0,
    kl_coef=0.02,
    learning_rate=9e-6,
    lr_scheduler_type="constant",
    num_sample_generations=0,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  return PPOTrainer(
    args=args,
    # What it reads of a tokenizer. The pad id is none of the model's: TRL masks it before the model sees it.
    processing_class=types.SimpleNamespace(
      pad_token_id=vocab_size, eos_token_id=0 if load["ends"] else vocab_size + 1
    ),
    model=policy,
    ref_model=ref,
    reward_model=reward,
    value_model=value,
    train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
    data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    callbacks=[callback],
  )


def watch(trainer: PPOTrainer) -> dict:
  """A dict that each iteration fills anew: when each phase ended, tokens, optimiser steps, metrics.

  Also makes the optimiser clip gradients.
  """
  seen = {}
  generation, forward, log = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log

  def watched_generation(model, queries, *args):
    tokens, logits = generation(model, queries, *args)
    seen.update(rollout=time.perf_counter(), answers=tokens[:, queries.shape[1] :], updates=0)
    return tokens, logits

  def watched_forward(*args):
    if torch.is_grad_enabled():  # the first one of the updates
      seen.setdefault("scoring", time.perf_counter())
    return forward(*args)

  def clip(*_):
    for network in (trainer.policy_model, trainer.value_model):
      torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)

  def count(*_):
    seen["updates"] += 1

  ppo_trainer.batch_generation, ppo_trainer.forward = watched_generation, watched_forward
  trainer.optimizer.optimizer.register_step_pre_hook(clip)
  trainer.optimizer.optimizer.register_step_post_hook(count)
  trainer.log = lambda metrics: seen.update(metrics=metrics) or log(metrics)
  return seen


def main():
  worker.claim_stdout()
  torch.set_num_threads(THREADS)
  load = json.loads(sys.argv[1])
  folder, steps = tempfile.TemporaryDirectory(), gate.Gate()
  trainer = make_trainer(load, folder.name, steps)
  seen = watch(trainer)

  def once() -> dict:
    seen.clear()
    start = time.perf_counter()
    steps.step()
    ends = [start, seen["rollout"], seen["scoring"], time.perf_counter()]
    answers = seen["answers"]
    is_end = answers == 0 if load["ends"] else torch.zeros_like(answers)
    is_real = is_end.cumsum(1) - is_end.int() == 0  # up to the end and with it
    return {
      "phases": {
        name: end - begin
        for name, begin, end in zip(("rollout", "scoring", "update"), ends, ends[1:])
      },
      "response_tokens": int(is_real.sum()),
      "decoded_tokens": answers.numel(),
      "updates": seen["updates"],
    }

  def serve():
    once()
    metrics = seen["metrics"]
    count = lambda model: sum(weight.numel() for weight in model.parameters())
    worker.serve(
      once,
      {
        "program": "TRL 1.12's PPO",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "policy_parameters": count(trainer.policy_model),
        "value_parameters": count(trainer.value_model),
        "first": {
          "policy_loss": metrics["loss/policy_avg"],
          "value_loss": metrics["loss/value_avg"],
          "ratio": metrics["val/ratio"],
          "kl": metrics["objective/kl"],
        },
      },
    )

  steps.hold(trainer.train, serve)


if __name__ == "__main__":
  main()
