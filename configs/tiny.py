"""The default preset, which runs everything from text to report on a laptop. Called by models.py."""

from configs import base


def change(config):
  """Changes the base config so that a run shows every finding on real text, within minutes on two CPU cores.

  Models this small need other values than the paper's.
  """
  decoder = dict(
    num_layers=2,
    d_model=96,
    num_heads=2,
    num_kv_heads=2,
    head_dim=48,
    d_mlp=384,
    max_length=128,
    position="rope",
    norm="rmsnorm",
    mlp="swiglu",
    use_bias=False,
    attention_window=0,
    # About d_model ** -.5. At .02, attention heads of this width learn nothing for hundreds of steps.
    init_std=0.08,
  )
  config.model.update(decoder)
  config.reward_model.update(
    decoder | dict(num_layers=4, d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, d_mlp=384)
  )
  config.execution.update(dtype="float32", remat="none")  # bfloat16 is slow on CPUs
  config.tokenizer.vocab_size = 2000
  config.data.update(
    {kind: "demo:" for kind in ("documents", "demonstrations", "comparisons", "prompts")},
    max_prompt_length=12,  # prompts and answers of the task are single lines
    max_response_length=20,
  )
  config.log.update(every_steps=100)
  config.checkpoint.update(every_steps=20)
  config.pretrain.update(
    num_steps=1200,
    batch_size=16,
    length=64,
    evaluate_every=300,
    optim=base.adam(6e-3, warmup_steps=30),
  )
  config.reward_pretrain.update(
    num_steps=1800,
    batch_size=8,
    length=128,  # long enough for three worked examples, a prompt and its answer (few-shot)
    evaluate_every=300,
    optim=base.adam(4e-3, warmup_steps=30),
  )
  # Departs from paper: the baseline has the pretraining mix too. Without it, a model this small forgets within an epoch
  # that documents continue after the end of a line, and little else would show in its pretraining loss.
  config.sft.update(
    num_epochs=2, batch_size=16, length=64, dropout=0.0, pretrain_mix=0.125, optim=base.adam(3e-3)
  )
  config.ppo_init.update(
    num_epochs=2, batch_size=16, length=64, pretrain_mix=0.125, optim=base.adam(3e-3)
  )
  config.collect.update(num_prompts=4000, num_heldout_prompts=300, max_responses=6)
  config.rm.update(
    batch_size=8,
    max_responses=6,
    row_length=64,  # a prompt and its answer have 20 tokens on average, so several share a row
    optim=base.adam(1e-3, warmup_steps=10),
    cross_validation_folds=5,
    cross_validation_prompts=600,
  )
  config.ppo.update(
    num_iterations=40,
    batch_size=128,
    num_minibatches=2,
    num_epochs=2,
    behaviour_logprob="rollout",
    beta=0.2,
    gamma=0.3,
    ptx_rows=1,
    ptx_microbatches=1,
    ptx_length=64,
    missing_eos="fixed",
    missing_eos_score=-1.0,
    ema_decay=0.8,  # averages over a few iterations, because the run has only 40
    max_kl=50.0,
    policy_optim=base.adam(7e-4, schedule="constant", warmup_steps=8, warmup_start=0.1),
    value_optim=base.adam(1e-3, schedule="constant"),
  )
  config.evaluate.update(
    num_prompts=64,
    samples_per_prompt=8,
    compare=("ppo", "ppo_ptx"),
    overoptimization=True,
    overoptimization_iterations=50,
    best_of_n=64,
    best_of_n_prompts=32,
    pretrain_batches=16,
    pretrain_every=8,
    checkpoints=4,
  )
