"""Size presets: `--config=configs/ppo_ptx.py:tiny`. A preset changes the base only where it differs."""

from configs import base


def _tiny(config):
  """Laptop: real text, every finding, minutes on two CPU cores. Small scale asks for other values than the paper's."""
  decoder = dict(
      num_layers=2, d_model=96, num_heads=4, num_kv_heads=4, head_dim=24, d_mlp=384, max_length=128,
      position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False, attention_window=0, dtype="float32", remat=False,
  )
  config.model.update(decoder)
  config.reward_model.update(decoder | dict(num_layers=4, d_model=128, head_dim=32, d_mlp=384))
  config.tokenizer.vocab_size = 2000
  config.data.update(max_prompt_length=16, max_response_length=20)
  config.log.update(every_steps=50, tensorboard=True)
  config.pretrain.update(num_steps=600, batch_size=32, length=64, optim=base.adam(4e-3, warmup_steps=30))
  config.reward_pretrain.update(num_steps=600, batch_size=32, length=64, optim=base.adam(3e-3, warmup_steps=30))
  config.sft.update(num_epochs=3, batch_size=16, length=64, dropout=0.1, optim=base.adam(1e-3))
  config.ppo_init.update(num_epochs=2, batch_size=16, length=64, optim=base.adam(1e-3))
  config.collect.update(num_prompts=3000, num_heldout_prompts=300)
  config.rm.update(batch_size=32, optim=base.adam(5e-4), cross_validation_folds=0, cross_validation_prompts=640)
  config.ppo.update(
      num_iterations=40, batch_size=128, num_minibatches=2, num_epochs=2, behaviour_logprob="rollout",
      beta=0.1, gamma=0.3, ptx_rows=2, ptx_length=64, missing_eos="fixed", missing_eos_score=-1.0, ema_decay=0.8, max_kl=50.0,
      policy_optim=base.adam(1e-3, schedule="constant", warmup_steps=8, warmup_start=0.1),
      value_optim=base.adam(1e-3, schedule="constant"),
  )
  config.evaluate.update(
      num_prompts=64, samples_per_prompt=4, compare=("ppo", "ppo_ptx"), overoptimization=True,
      overoptimization_iterations=40, overoptimization_learning_rate=2e-3, best_of_n=32, best_of_n_prompts=64, pretrain_batches=16,
  )


PRESETS = {"tiny": _tiny}


def get(stage: str, preset: str | None):
  """The config of a stage at a size; the smallest if none is named."""
  name = preset or "tiny"
  if name not in PRESETS:
    raise ValueError(f"preset {name!r} must be one of {', '.join(PRESETS)}")
  config = base.base(stage)
  config.preset = name
  PRESETS[name](config)
  return config
