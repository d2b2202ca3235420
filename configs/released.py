"""Presets with the shapes of released models, to start from their weights. Called by models.py.

`--config.model.weights=PATH` names the weights, and the reward model starts from the same ones. The shapes are those in
the models' own config.json. The other values are the paper's (base.py) or marked `open`.
"""

from configs import base


def _gpt2(config):
  """GPT-2 small, 124M, for one GPU."""
  decoder = dict(
    num_layers=12,
    d_model=768,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    d_mlp=3072,
    max_length=1024,
    attention_window=0,
  )
  config.model.update(decoder)
  config.reward_model.update(decoder)
  config.execution.update(dtype="float32")  # the weights were released in float32
  # Half the context each, as in App. C.
  config.data.update(max_prompt_length=512, max_response_length=512)
  # The rate is that of GPT-3 125M, for training from scratch. The batch is small because held-out text is evaluated in
  # batches of this size even if pretraining is skipped.
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(batch_size=16, length=1024, optim=base.adam(6e-4, warmup_steps=100))
  config.sft.update(batch_size=16, length=1024, optim=base.adam(2e-5))  # open
  config.ppo_init.update(batch_size=16, length=1024, optim=base.adam(2e-5))  # open
  # lm-human-preferences trained this model with these values: reward model 5e-5 in batches of 32, PPO 1e-5.
  config.rm.update(batch_size=32, optim=base.adam(5e-5))
  config.ppo.update(
    num_iterations=200,  # open
    batch_size=64,  # open; minibatches of 16
    num_minibatches=4,
    behaviour_logprob="rollout",
    beta=0.05,  # open; Stiennon et al. 2020
    ptx_length=512,  # open
    ptx_microbatches=8,  # 16 rows at a time
    policy_optim=base.adam(1e-5, schedule="constant", warmup_steps=40, warmup_start=0.1),
    value_optim=base.adam(1e-5, schedule="constant"),
  )
  config.evaluate.update(num_prompts=256)


def _smollm2_135m(config):
  """SmolLM2-135M, a real model: 70 minutes on two cores of a server. Values are open: small batches of short texts."""
  decoder = _llama(
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_mlp=1536,
    max_length=8192,
    rope_base=100_000.0,
    init_std=576**-0.5,
  )
  config.model.update(decoder)
  config.reward_model.update(decoder)
  config.execution.update(dtype="float32", remat="none")  # bfloat16 is slow on CPUs
  config.tokenizer.vocab_size = 49152
  config.data.update(max_prompt_length=64, max_response_length=64, validation_fraction=0.15)
  config.checkpoint.update(every_steps=50, keep=1)
  config.log.update(every_steps=4)
  # Held-out text is evaluated in batches of this size, even if pretraining is skipped.
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(batch_size=8, length=256, optim=base.adam(1e-3, warmup_steps=100))
  config.sft.update(num_epochs=1, batch_size=8, length=256, dropout=0.0, optim=base.adam(2e-5))
  config.ppo_init.update(
    num_epochs=1, batch_size=8, length=256, pretrain_mix=0.125, optim=base.adam(2e-5)
  )
  config.collect.update(num_prompts=256, num_heldout_prompts=64, min_responses=2, max_responses=2)
  # Most public comparisons are pairs. Rows for further answers would cost time even if they are empty.
  config.rm.update(batch_size=8, max_responses=2, row_length=128, optim=base.adam(5e-5))
  config.ppo.update(
    num_iterations=20,
    batch_size=64,
    num_minibatches=4,
    packed_rows=4,
    behaviour_logprob="rollout",
    beta=0.05,
    gamma=0.3,
    ptx_rows=1,
    ptx_microbatches=1,
    ptx_length=128,
    missing_eos="fixed",
    ema_decay=0.8,  # averages over a few iterations, because the run has only 20
    max_kl=50.0,
    policy_optim=base.adam(2e-5, schedule="constant", warmup_steps=8, warmup_start=0.1),
    value_optim=base.adam(2e-5, schedule="constant"),
  )
  config.evaluate.update(num_prompts=128, pretrain_batches=4, pretrain_every=5)


def _llama3_8b(config):
  """Llama 3 8B with the paper's values for 6B, for a host of accelerators. Llama 3.0 has no scaling of positions."""
  _llama3(config, num_layers=32, d_model=4096, num_heads=32, d_mlp=14336)
  # The rate is Llama 3's peak rate (arXiv:2407.21783 table 3), for training from scratch. Held-out text is evaluated in
  # batches of this size, even if pretraining is skipped.
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(batch_size=64, optim=base.adam(3e-4, warmup_steps=100))
  config.ppo_init.optim.learning_rate = 1.04e-5  # C.3, 6B


def _llama3_70b(config):
  """Llama 3 70B, for a pod. Of the paper's values it has those for 6B, the largest that it prints up to this size."""
  _llama3(config, num_layers=80, d_model=8192, num_heads=64, d_mlp=28672)
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(
      batch_size=64, optim=base.adam(1.5e-4, warmup_steps=100)
    )  # table 3, as above
  config.ppo_init.optim.learning_rate = 1.04e-5  # C.3, 6B
  # Departs from paper: its reward model is 6B for all policies (C.2). This one has the policy's shape, because it
  # starts from the same weights.
  # open: what fits in the 16 GiB of a v5e; on fsdp=32 each device computes one row at a time
  config.execution.remat = "full"
  config.ppo.update(microbatches=2, score_microbatches=16, ptx_microbatches=16)


def _llama3(config, **sizes):
  """What the sizes of Llama 3 share."""
  decoder = _llama(
    num_kv_heads=8,
    head_dim=128,
    max_length=8192,
    rope_base=500_000.0,
    tie_embeddings=False,
    **sizes,
  )
  config.model.update(decoder)
  config.reward_model.update(decoder)
  config.tokenizer.vocab_size = 128256
  # open: the training state is too large for a copy on every device
  config.mesh.update(data=1, fsdp=-1)


def _llama(**sizes) -> dict:
  """The switches that all Llama-like models share, together with `sizes`."""
  switches = dict(
    position="rope", norm="rmsnorm", norm_eps=1e-5, mlp="swiglu", use_bias=False, attention_window=0
  )
  return switches | sizes


PRESETS = {
  "gpt2": _gpt2,
  "smollm2_135m": _smollm2_135m,
  "llama3_8b": _llama3_8b,
  "llama3_70b": _llama3_70b,
}
