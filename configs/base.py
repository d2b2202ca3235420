"""The value of every setting, and beside it where the value comes from.

Config files name their stage, and presets (listed in models.py) change the values that differ.

If the paper (Ouyang et al. 2022, arXiv:2203.02155) states a value, it is used here, and the comment names the section
("C.n", "E.n"); where it is not used, the comment says `Departs from paper` and the paper's value. `open` marks a choice
of ours where the paper's recipe needs a value that it does not state. Most values without a comment follow from others
or concern this program only. The meaning and the unit of a setting are beside its field in instructjax/core/.
docs/settings.md, which is generated, shows both.
"""

from ml_collections import ConfigDict


def adam(learning_rate, **changes) -> ConfigDict:
  """The optimiser of App. C: Adam with beta1 = .9 and beta2 = .95, and with `changes` to its settings."""
  optim = ConfigDict(
    dict(
      learning_rate=learning_rate,
      schedule="cosine",
      warmup_steps=0,  # C.1: no warmup
      warmup_start=0.0,
      end_fraction=0.1,  # C.1, C.2: cosine down to 10%
      b1=0.9,  # App. C
      b2=0.95,  # App. C
      eps=1e-8,  # open; GPT-3's
      weight_decay=0.0,  # open
      clip_norm=1.0,  # open; GPT-3's
    )
  )
  optim.update(changes)
  return optim


def _decoder(**changes) -> ConfigDict:
  """The network of GPT-3 XL (1.3B), with `changes` to its settings."""
  model = ConfigDict(
    dict(
      num_layers=24,  # GPT-3 XL (1.3B)
      d_model=2048,  # GPT-3 XL
      num_heads=16,  # open: GPT-3 prints 24 for XL, by which its width is not divisible
      num_kv_heads=16,
      head_dim=128,  # GPT-3 XL
      d_mlp=8192,  # GPT-3: four times the width
      max_length=2048,  # App. C: 2k tokens
      position="learned",
      rope_base=10_000.0,
      rope_local_base=0.0,
      rotary_dim=0,
      rope_scaling=dict(
        kind="none",
        factor=8.0,  # Llama 3.1; used only if kind is not none
        low_freq_factor=1.0,  # Llama 3.1
        high_freq_factor=4.0,  # Llama 3.1
        original_length=8192,  # Llama 3.1
        attention_factor=0.0,  # arXiv:2309.00071, eq. 22
      ),
      norm="layernorm",
      norm_eps=1e-5,
      sandwich_norm=False,
      qk_norm=False,
      mlp="gelu",
      parallel_residual=False,
      use_bias=True,
      qkv_bias=False,
      attention_window=256,  # open: GPT-3 prints no band width
      layer_pattern="GL",  # GPT-3: dense and locally banded layers by turns
      query_pre_attn_scalar=0,
      scale_embeddings=False,
      tie_embeddings=True,
      init_std=0.02,
      weights="",
    )
  )
  model.update(changes)
  return model


def base(stage: str) -> ConfigDict:
  """The paper's settings for the 1.3B policy with a 6B reward model. Presets change them for other sizes."""
  return ConfigDict(
    dict(
      stage=stage,
      preset="paper",
      seed=0,
      model=_decoder(),
      reward_model=_decoder(
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=32,
        d_mlp=16384,  # GPT-3 6.7B
      ),
      adapter=dict(
        rank=0,
        alpha=32.0,  # open; with rank 16 the factor of 2 that is usual
        targets=("q", "k", "v", "out", "gate", "up", "down"),  # open: all matrices of the layers
        rate_factor=10.0,  # open: adapters need about 10 times the rate of all weights (Schulman et al. 2025)
        dropout=0.0,  # open
        base="float",
      ),
      execution=dict(
        dtype="bfloat16",  # Departs from paper: App. C has fp16; the float32 master weights are as there
        layers="auto",
        attention="auto",
        remat="products",
        decode_layout="auto",
      ),
      tokenizer=dict(path="", vocab_size=50257),  # GPT-2's
      data=dict(
        documents="",
        demonstrations="",
        comparisons="",
        prompts="",
        max_prompt_length=1024,  # App. C: longer prompts are filtered out
        max_response_length=1024,  # App. C
        validation_fraction=0.05,  # Departs from paper: table 6 holds out 11% (SFT) to 35% (RM), split by user
        token_cache="",
        on_bad_record="raise",
      ),
      mesh=dict(
        slice=1,
        data=-1,  # our choice; gpt3_* and llama3_* use data=1, fsdp=-1
        fsdp=1,  # our choice; gpt3_* and llama3_* use data=1, fsdp=-1
        tensor=1,
      ),
      checkpoint=dict(every_steps=100, keep=2),
      log=dict(
        every_steps=10,
        samples=4,
        trackers=("tensorboard",),
        project="",
        run_name="",
        offline=False,
      ),
      profile=dict(steps=""),
      guard=dict(
        memory="refuse",
        stuck_factor=20.0,
        stuck_seconds=120.0,
        phase_seconds=3600.0,
        grace_seconds=60.0,
      ),
      pretrain=dict(
        num_steps=1000,  # Departs from paper: GPT-3 has 300B tokens, as gpt3_* do
        batch_size=512,  # GPT-3 XL: 1M tokens
        microbatches=1,
        length=2048,  # GPT-3
        evaluate_every=100,
        optim=adam(
          2e-4,  # GPT-3 XL
          warmup_steps=100,  # Departs from paper: GPT-3 warms up over 375M tokens, as gpt3_* do
          weight_decay=0.0,  # Departs from paper: GPT-3 has .1, as gpt3_* do
        ),
      ),
      reward_pretrain=dict(
        num_steps=1000,  # Departs from paper: GPT-3 has 300B tokens, as gpt3_* do
        batch_size=512,  # Departs from paper: GPT-3 6.7B has 2M tokens, 1024 rows; gpt3_* use them
        microbatches=1,
        length=2048,  # GPT-3
        evaluate_every=100,
        optim=adam(
          1.2e-4,  # GPT-3 6.7B
          warmup_steps=100,  # Departs from paper: GPT-3 warms up over 375M tokens, as gpt3_* do
          weight_decay=0.0,  # Departs from paper: GPT-3 has .1, as gpt3_* do
        ),
      ),
      sft=dict(
        num_epochs=16,  # C.1
        batch_size=32,  # C.1; Departs from paper: counts packed rows, where the paper counts demonstrations
        microbatches=1,
        length=2048,
        dropout=0.2,  # C.1
        pretrain_mix=0.0,
        weights="",
        optim=adam(9.65e-6),  # C.1
      ),
      ppo_init=dict(
        num_epochs=2,  # C.3
        batch_size=32,  # C.3; Departs from paper: counts packed rows, where the paper counts demonstrations
        microbatches=1,
        length=2048,
        dropout=0.0,  # open
        pretrain_mix=0.1,  # C.3; Departs from paper: a share of the packed rows, not of the loss
        weights="",
        optim=adam(5e-6),  # C.3, 1.3B
      ),
      collect=dict(
        num_prompts=33207,  # table 6
        num_heldout_prompts=17887,  # table 6: the validation prompts
        min_responses=4,  # sec 3.5: K in 4..9
        max_responses=9,  # sec 3.5
        temperature=1.0,  # open
        rounds=1,  # sec 3.1: most comparisons are of SFT policies' answers
        wanted=1,  # sec 3.4: one labeler each; agreement was measured apart
      ),
      rm=dict(
        start_from="base",  # Departs from paper: C.2 tunes it on public NLP sets first, with "similar results"
        weights="",
        num_epochs=1,  # C.2: more epochs overfit
        batch_size=64,  # C.2
        microbatches=1,
        max_responses=9,  # sec 3.5: K in 4..9
        row_length=0,
        share_prompts=False,
        ties="drop",  # C.2; open: whether a dropped tie counts in eq. 1's C(K,2), as it does here
        optim=adam(9e-6),  # C.2
        cross_validation_folds=0,  # Departs from paper: sec 4.1 has 5, which need the labelers' names
        cross_validation_prompts=33207,
      ),
      ppo=dict(
        num_iterations=500,  # 256k episodes / 512
        batch_size=512,  # C.4
        num_minibatches=8,  # C.4: minibatch 64
        microbatches=1,
        score_microbatches=1,
        num_epochs=1,  # C.4: a single inner epoch
        share_prompts=False,
        packed_rows=0,  # open: a minibatch of 64 padded episodes has just enough rows for 64 devices
        temperature=1.0,  # C.4
        rewards=("rm",),  # eq. 2
        ensemble=(),
        ensemble_penalty=0.1,  # open
        constant_iterations=20,
        samples_per_prompt=1,  # C.4 has 256k episodes for 31k prompts; open: whether a batch repeats one
        advantage="gae",  # C.4
        behaviour_logprob="rescore",  # open: log-probabilities of decoding and scoring differ in bfloat16
        beta=0.02,  # C.4
        kl_controller="fixed",
        kl_target=6.0,  # lm-human-preferences
        kl_horizon=10_000,  # lm-human-preferences
        gamma=27.8,  # C.4
        ptx_rows=8,  # C.4: 8x more pretraining examples than episodes
        ptx_microbatches=2,  # open: 4 rows per microbatch and device, for a minibatch of 64 episodes on fsdp=64
        ptx_length=2048,  # open
        ptx_reduction="mean",  # open: the paper does not say
        discount=1.0,  # C.4
        gae_lambda=0.95,  # open; Stiennon et al. 2020
        clip=0.2,  # C.4
        value_clip=0.2,  # open; lm-human-preferences
        whiten_advantages=True,  # open; lm-human-preferences
        whiten_rewards=False,  # open
        missing_eos="as_is",  # open
        missing_eos_score=-1.0,
        ema_decay=0.992,  # C.4; open: whether it applies per iteration
        max_kl=0.0,  # open
        value_init="reward_model",  # C.4
        value_warmup=0,  # C.4 mentions none
        policy_optim=adam(
          8.05e-6,  # open: the paper does not print its final rates; E.9 sweeps 2.55e-6 to 2.55e-5
          schedule="constant",  # C.4
          warmup_steps=80,  # C.4: 10 iterations of 8 updates
          warmup_start=0.1,  # C.4
        ),
        value_optim=adam(9e-6, schedule="constant"),  # C.4
      ),
      rollout=dict(slots=0),  # open
      best_of_n=dict(
        policy="sft",  # open; the paper does not sample by rejection
        n=64,  # open; WebGPT's largest (arXiv:2112.09332)
        num_prompts=0,  # open
        temperature=1.0,  # open
      ),
      evaluate=dict(
        num_prompts=512,  # Departs from paper: its test set has 3196 prompts
        samples_per_prompt=1,
        temperature=1.0,  # open for the main evaluations; App. F samples InstructGPT at 1, GPT-3 at .7
        weights="ema",  # open: C.4 keeps the average and does not say that it is what is evaluated
        compare=("ppo",),  # fig. 1 shows PPO beside PPO-ptx
        overoptimization=False,
        overoptimization_iterations=500,
        group_size=4,  # open; Ahmadian et al. 2024 have 2 and 4
        best_of_n=0,
        best_of_n_prompts=64,
        bootstrap=1000,
        pretrain_batches=8,
        pretrain_every=50,
        checkpoints=0,  # open: at 1.3B a state of PPO takes tens of GB, and all that are asked for stay on the disk
      ),
    )
  )
