"""Mutants written by hand: slips in what a module means, which no operator on its syntax makes.

Each is (module, what is wrong then, text that stands once in the module, text in its place). Called by `plan`.
"""

# ruff: noqa: E501  one mutant a line

from tests.mutation.operators import Mutant

_VALUE_LOSS = "value_BR, batch.value_BR, batch.return_BR, batch.is_response_BR, clip=cfg.value_clip"
_POLICY_LOSS = (
  "logprob_BR, batch.behaviour_logprob_BR, batch.advantage_BR, batch.is_actor_BR, clip=cfg.clip"
)

WRITTEN = [
  # --- ppo: the step
  ("rl/step", "value trained on advantages", _VALUE_LOSS, _VALUE_LOSS.replace("return", "advantage")),
  ("rl/step", "value masked by the actor's tokens", _VALUE_LOSS, _VALUE_LOSS.replace("is_response", "is_actor")),
  ("rl/step", "value clipped by the policy's clip", _VALUE_LOSS, _VALUE_LOSS.replace("cfg.value_clip", "cfg.clip")),
  ("rl/step", "value clipped around the returns", _VALUE_LOSS, _VALUE_LOSS.replace("batch.value_BR", "batch.return_BR")),
  ("rl/step", "value's gradient unclipped", "_clip(value.grads, cfg.value_optim.clip_norm)", "value.grads"),
  ("rl/step", "value's gradient clipped to the policy's norm", "_clip(value.grads, cfg.value_optim.clip_norm)", "_clip(value.grads, cfg.policy_optim.clip_norm)"),
  ("rl/step", "value averaged over the actor's tokens in shared rows", 'state.value_params, batch, "is_response_BR"', 'state.value_params, batch, "is_actor_BR"'),
  ("rl/step", "value stepped by the policy's optimiser", "nets.value_tx, grads, state.value_params", "nets.policy_tx, grads, state.value_params"),
  ("rl/step", "policy learns returns", _POLICY_LOSS, _POLICY_LOSS.replace("advantage", "return")),
  ("rl/step", "policy learns tokens of answers that never end", _POLICY_LOSS, _POLICY_LOSS.replace("is_actor", "is_response")),
  ("rl/step", "policy clipped by the value's clip", _POLICY_LOSS, _POLICY_LOSS.replace("cfg.clip", "cfg.value_clip")),
  ("rl/step", "policy scored at temperature 1", "temperature=cfg.temperature,\n  )\n  return surrogate", "temperature=1.0,\n  )\n  return surrogate"),
  ("rl/step", "policy's gradient unclipped", "_clip(ppo.grads, cfg.policy_optim.clip_norm)", "ppo.grads"),
  ("rl/step", "pretraining gradient unclipped", "ptx_grads = _clip(ptx_grads, cfg.policy_optim.clip_norm)", "ptx_grads = ptx_grads"),
  ("rl/step", "gamma counted twice", "g + cfg.gamma * g_lm", "g + cfg.gamma**2 * g_lm"),
  ("rl/step", "pretraining gradient subtracted", "g + cfg.gamma * g_lm", "g - cfg.gamma * g_lm"),
  ("rl/step", "pretraining loss a mean over rows", 'if cfg.ptx_reduction == "mean" else', 'if cfg.ptx_reduction == "sum" else'),
  ("rl/step", "ratio_max a mean", 'jnp.max(x) if name == "ratio_max" else jnp.mean(x)', "jnp.mean(x)"),
  ("rl/step", "first_ratio_max of the last minibatch", 'metrics["ratio_max"][0]', 'metrics["ratio_max"][-1]'),
  ("rl/step", "same order in each epoch", "jax.random.split(key, cfg.num_epochs)", "jnp.stack([key] * cfg.num_epochs)"),
  ("rl/step", "average takes the new weights' share", "decay * e + (1 - decay) * p", "(1 - decay) * e + decay * p"),
  ("rl/step", "average of the value network's", "ema_params, state.params)", "ema_params, ema_params)"),
  ("rl/step", "same noise in each iteration", "jax.random.fold_in(state.key, state.step)", "state.key"),
  ("rl/step", "rollout at temperature 1", "temperature=cfg.temperature,\n      slots", "temperature=1.0,\n      slots"),
  ("rl/step", "adaptive beta from a batch of one", "num_episodes=cfg.batch_size", "num_episodes=1"),
  ("rl/step", "pretraining rows without gamma", 'batch["pretrain"] if cfg.gamma > 0 else None', "None"),
  ("rl/step", "average starts from nothing", "jax.tree.map(jnp.copy, params) if cfg.ema_decay else None", "jax.tree.map(jnp.zeros_like, params) if cfg.ema_decay else None"),
  # --- ppo: experience
  ("rl/experience", "reference is the policy", "logprob(frozen.ref_params)", "logprob(state.params)"),
  ("rl/experience", "reward by the value network", "nets.scalar, frozen.reward_params", "nets.scalar, state.value_params"),
  ("rl/experience", "values by the reward model", "nets.scalar, state.value_params, **response", "nets.scalar, frozen.reward_params, **response"),
  ("rl/experience", "every answer counts as ended", "jnp.any((response_BR == nets.eos_id) & mask_BR, axis=1)", "jnp.any(mask_BR, axis=1)"),
  ("rl/experience", "fixed score for ended answers", "jnp.where(has_eos_B, score_B, cfg.missing_eos_score)", "jnp.where(has_eos_B, cfg.missing_eos_score, score_B)"),
  ("rl/experience", "returns of whitened advantages", "advantage_BR = masked.masked_whiten(advantage_BR, is_actor_BR)", "advantage_BR = masked.masked_whiten(advantage_BR, is_actor_BR)\n      return_BR = advantage_BR + value_BR"),
  ("rl/experience", "whitened over all tokens", "masked.masked_whiten(advantage_BR, is_actor_BR)", "masked.masked_whiten(advantage_BR, mask_BR)"),
  ("rl/experience", "rewards lose their mean", "shift_mean=False", "shift_mean=True"),
  ("rl/experience", "objective of the raw score", "jnp.mean(score_B - state.kl_coef * kl_B)", "jnp.mean(rm_score_B - state.kl_coef * kl_B)"),
  ("rl/experience", "beta of the config, not of the state", "mask_BR, state.kl_coef)", "mask_BR, cfg.beta)"),
  ("rl/experience", "discount and lambda exchanged", "discount=cfg.discount, lam=cfg.gae_lambda", "discount=cfg.gae_lambda, lam=cfg.discount"),
  # --- ops
  ("ops/gae", "no lambda", "discount * lam * next_advantage_B", "discount * next_advantage_B"),
  ("ops/gae", "bootstraps past the end", "value_BR = jnp.where(is_response_BR, value_BR, 0).astype(jnp.float32)", "value_BR = value_BR.astype(jnp.float32)"),
  ("ops/gae", "from the first column to the last", "reverse=True", "reverse=False"),
  ("ops/gae", "returns without the value", "return advantage_BR, advantage_BR + value_BR", "return advantage_BR, advantage_BR"),
  ("ops/kl", "k1 the other way round", "return logprob - ref_logprob", "return ref_logprob - logprob"),
  ("ops/kl", "score at every token", "jnp.where(is_last_BR, score_B[:, None], 0)", "jnp.where(is_response_BR, score_B[:, None], 0)"),
  ("ops/kl", "KL rewarded", "score_BR.astype(jnp.float32) - kl_coef", "score_BR.astype(jnp.float32) + kl_coef"),
  ("ops/kl", "adaptive beta unclipped", "relative_error = jnp.clip(relative_error, -_MAX_RELATIVE_ERROR, _MAX_RELATIVE_ERROR)", "relative_error = relative_error + 0"),
  ("ops/masked", "variance with n - 1", "jnp.maximum(_count(mask), 1)", "jnp.maximum(_count(mask) - 1, 1)"),
  ("ops/masked", "mean of all places", "jnp.maximum(_count(mask, axis), 1)", "jnp.maximum(jnp.float32(mask.size), 1)"),
  ("ops/preference", "no share of C(K,2)", "nll_B / jnp.maximum(num_comparisons_B, 1)", "nll_B"),
  ("ops/preference", "ties left out of C(K,2)", "nll_B / jnp.maximum(num_comparisons_B, 1)", "nll_B / jnp.maximum(jnp.sum(target_BCC, axis=(1, 2)), 1)"),
  ("ops/preference", "higher rank is better", "(rank_i_BCC < rank_j_BCC)", "(rank_i_BCC > rank_j_BCC)"),
  ("ops/preference", "loss over all prompts", "masked_mean(nll_B / jnp.maximum(num_comparisons_B, 1), has_pair_B)", "jnp.mean(nll_B / jnp.maximum(num_comparisons_B, 1))"),
  ("ops/preference", "accuracy's sign", "jnp.sign(margin_BCC)", "jnp.sign(-margin_BCC)"),
  ("ops/preference", "equal scores are right", "is_correct = 0.5 * (1 + np.sign(margin))", "is_correct = 1.0 * (margin >= 0)"),
  ("ops/surrogate", "pessimism lost: the smaller loss", "masked_mean(jnp.maximum(unclipped_BR, clipped_BR), is_response_BR)\n\n  is_clipped_BR = (clipped_BR > unclipped_BR).astype(jnp.float32)\n  return loss, {\n    \"clip_fraction\": masked_mean(is_clipped_BR, is_response_BR),\n    \"approx_kl\"", "masked_mean(jnp.minimum(unclipped_BR, clipped_BR), is_response_BR)\n\n  is_clipped_BR = (clipped_BR > unclipped_BR).astype(jnp.float32)\n  return loss, {\n    \"clip_fraction\": masked_mean(is_clipped_BR, is_response_BR),\n    \"approx_kl\""),
  ("ops/surrogate", "ratio the other way round", "logprob_BR - behaviour_logprob_BR, 0)", "behaviour_logprob_BR - logprob_BR, 0)"),
  ("ops/surrogate", "ratio_max of pads too", "jnp.max(jnp.where(is_response_BR, ratio_BR, 0))", "jnp.max(ratio_BR)"),
  ("ops/surrogate", "value loss not halved", "loss = 0.5 * masked_mean", "loss = 1.0 * masked_mean"),
  ("ops/lm", "temperature multiplied", "table_VD.astype(dtype)) / temperature", "table_VD.astype(dtype)) * temperature"),
  ("ops/lm", "weights counted as 0 or 1", "jnp.sum(nll_NT1), (d_table_VD, d_h_NTD)", "jnp.sum(nll_NT1), (d_table_VD, 2 * d_h_NTD)"),
  # --- reward model
  ("stages/rm", "accuracy's sign", "score_K[i] - score_K[j] if rank_K[i] < rank_K[j]", "score_K[i] - score_K[j] if rank_K[i] > rank_K[j]"),
  ("stages/rm", "ties counted right", "      if rank_K[i] != rank_K[j]\n", ""),
  ("stages/rm", "equal scores are right", "np.sum(m > 0) for m", "np.sum(m >= 0) for m"),
  ("stages/rm", "error over pairs", "stderr = np.sqrt(np.sum((right - accuracy * total) ** 2)) / total.sum()", "stderr = np.sqrt(accuracy * (1 - accuracy) / total.sum())"),
  ("stages/rm", "error over rankings", "_, which = np.unique([str(item.prompt) for item in rankings], return_inverse=True)", "which = np.arange(len(rankings))"),
  ("stages/rm", "bias from validation demonstrations", 'demonstration_tokens("train")', 'demonstration_tokens("validation")'),
  ("stages/rm", "bias without EOS", "item.response + [ctx.tokenizer.eos_id]", "item.response"),
  ("stages/rm", "validation is the training data", 'validation=judge(ctx, params, records("validation"))', 'validation=judge(ctx, params, records("train"))'),
  ("stages/rm", "held-out labelers are the validation", 'judge(ctx, params, records("heldout"))', 'judge(ctx, params, records("validation"))'),
  ("stages/rm", "trained on validation data", 'train(ctx, stage, stage, records("train"), ctx.key(stage))', 'train(ctx, stage, stage, records("validation"), ctx.key(stage))'),
  ("stages/rm", "cross-validation judged on training rankings", "heldout=judge(ctx, params, [r for r in held_out if r.labeler in outside])", "heldout=judge(ctx, params, [r for r in train_records if r.labeler in outside])"),
  ("stages/rm", "cross-validation trained on all labelers", "inside = [r for r in train_records if r.labeler not in outside]", "inside = [r for r in train_records]"),
  ("stages/rm", "folds share a head's key", "inside, ctx.key(name))", "inside, ctx.key(stage))"),
  ("stages/rm", "ties as configured are ignored", "ties=cfg.ties", 'ties="drop"'),
  ("stages/rm", "schedule of one epoch", "num_steps = cfg.num_epochs * batches.steps_per_epoch", "num_steps = batches.steps_per_epoch"),
  ("models/heads", "bias added", '["bias"] - jnp.float32(amount)', '["bias"] + jnp.float32(amount)'),
  # --- the other stages
  ("stages/sft", "trained on validation demonstrations", 'ctx.data.demonstration_rows("train"', 'ctx.data.demonstration_rows("validation"'),
  ("stages/sft", "validation is the training data", 'ctx.data.demonstration_rows("validation"', 'ctx.data.demonstration_rows("train"'),
  ("stages/sft", "held-out text mixed in", 'document_batches(ctx, "train"', 'document_batches(ctx, "validation"'),
  ("stages/sft", "the epoch with the worst loss", "min(epochs, key=lambda epoch: epoch.validation_loss)", "max(epochs, key=lambda epoch: epoch.validation_loss)"),
  ("stages/sft", "no dropout", "dropout_rate=cfg.dropout", "dropout_rate=0.0"),
  ("stages/sft", "schedule of one epoch", "num_steps = cfg.num_epochs * steps_per_epoch", "num_steps = steps_per_epoch"),
  ("stages/sft", "losses exchanged", '"loss": evaluate(state.params, demonstrations)', '"loss": evaluate(state.params, text)'),
  ("stages/sft_select", "the epoch with the lowest reward", "max(epochs, key=lambda epoch: epoch.reward)", "min(epochs, key=lambda epoch: epoch.reward)"),
  ("stages/sft_select", "chosen on training prompts", 'prompt_tokens("validation")[', 'prompt_tokens("train")['),
  ("stages/sft_select", "median for the mean", "score.mean()", "np.median(score)"),
  ("stages/pretrain", "trained on held-out text", 'ctx, "train", length=cfg.length', 'ctx, "validation", length=cfg.length'),
  ("stages/pretrain", "another learning-rate schedule", "tx = make_optimizer(cfg.optim, cfg.num_steps)", "tx = make_optimizer(cfg.optim, cfg.num_steps + 1)"),
  ("stages/collect", "held-out labelers are the training ones", 'simulation.collect_rankings(held_out, "heldout", seed)', 'simulation.collect_rankings(held_out, "train", seed)'),
  ("stages/collect", "validation on training answers", 'simulation.collect_rankings(held_out, "train", seed)', 'simulation.collect_rankings(train, "train", seed)'),
  ("stages/collect", "held-out prompts are the training ones", 'ctx.data.records("prompts", "validation")', 'ctx.data.records("prompts", "train")'),
  ("stages/collect", "never the most answers", "cfg.max_responses + 1, num_prompts", "cfg.max_responses, num_prompts"),
  ("stages/policies", "always the raw weights", '"ema_params" if averaged else "params"', '"params"'),
  ("stages/policies", "bias added", "done.result.demonstration_mean)", "-done.result.demonstration_mean)"),
  ("stages/policies", "SFT by loss", "done = (ctx.done(again) if again else None) or ctx.require_done(row.name)", "done = ctx.require_done(row.name)"),
  ("stages/ppo", "the policy starts from SFT", 'policies.load(ctx, REFERENCE)', 'policies.load(ctx, "sft")'),
  ("stages/ppo", "reward model without its bias", '"reward_model": policies.load_reward(ctx)', '"reward_model": policies.load_step(ctx, "rm", ctx.require_done("rm").require_step())'),
  ("stages/ppo", "validation prompts", 'ctx.data.prompt_tokens("train")', 'ctx.data.prompt_tokens("validation")'),
  ("stages/ppo", "held-out text in the loss", 'ctx, "train", length=cfg.ptx_length', 'ctx, "validation", length=cfg.ptx_length'),
  ("stages/ppo", "no limit on the KL", 'limits={"kl": cfg.max_kl} if cfg.max_kl else {}', "limits={}"),
  ("stages/ppo", "optimisers clip too", "dataclasses.replace(optim, clip_norm=None)", "optim"),
  ("stages/ppo", "schedule in iterations", "updates = cfg.num_iterations * cfg.num_epochs * cfg.num_minibatches", "updates = cfg.num_iterations"),
  ("stages/ppo", "value network on the policy's rate", "value_tx=unclipped(cfg.value_optim)", "value_tx=unclipped(cfg.policy_optim)"),
  ("stages/ppo", "raw weights measured along the training", "state.ema_params if averaged else state.params", "state.params"),
  ("stages/evaluate", "judged on validation prompts", 'ctx.data.records("prompts", "test")', 'ctx.data.records("prompts", "validation")'),
  ("stages/evaluate", "KL from itself", "for source in (name, REFERENCE)", "for source in (name, name)"),
  ("stages/evaluate", "best of n by gold", "order = np.argsort(reward_PN", "order = np.argsort(gold_PN"),
  ("stages/evaluate", "all policies draw the same noise", 'ctx.key(f"{stage}/{name}")', "ctx.key(stage)"),
  # --- train
  ("train/optim", "small gradients scaled up", "jnp.where(norm > max_norm, max_norm / norm, 1.0)", "max_norm / norm"),
  ("train/optim", "clipped after Adam", "parts.insert(0, optax.stateless(clip))", "parts.append(optax.stateless(clip))"),
  ("train/optim", "decay of biases too", "mask=is_decayed", "mask=None"),
  ("train/optim", "cosine over the warmup too", "decay_steps = num_steps - warmup_steps", "decay_steps = num_steps"),
  ("train/supervised", "same dropout at each step", "jax.random.fold_in(state.key, state.step)", "state.key"),
  ("train/supervised", "loss a mean over all tokens", "sum_nll / jnp.maximum(sum_weight, 1.0)", "sum_nll / batch.token_BL.size"),
  ("train/supervised", "validation a mean of means", "return float(sum(nll for nll, _ in totals)) / float(sum(weight for _, weight in totals))", "return float(sum(nll / weight for nll, weight in totals)) / len(totals)"),
  ("train/supervised", "predicts the token itself", "batch.token_BL[:, 1:], batch.weight_BL[:, 1:])", "batch.token_BL[:, :-1], batch.weight_BL[:, 1:])"),
  ("train/loop", "NaN seen only where a step is saved", "log.write(late[0], judge(*late[:2]), late[2])", "log.write(late[0], _to_floats(late[1]), late[2])"),
  ("train/loop", "limits seen only where a step is saved", "log.write(late[0], judge(*late[:2]), late[2])", "log.write(late[0], (judge if math.isfinite(sum(_to_floats(late[1]).values())) is False else lambda _, m: _to_floats(m))(*late[:2]), late[2])"),
  ("train/loop", "infinities pass", "if not math.isfinite(value)", "if math.isnan(value)"),
  ("train/loop", "saved before it is judged", "late = (step, metrics, samples)", "late = None"),
  ("train/checkpoint", "half-copied checkpoints are whole", '"_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata"', '"_CHECKPOINT_METADATA", "meta/metadata"'),
  ("train/checkpoint", "fingerprints without shapes", "{dtype} {np.shape(leaf)}", "{dtype}"),
  ("train/checkpoint", "fingerprints without names", "{jax.tree_util.keystr(path)} {dtype}", "{dtype}"),
  ("train/checkpoint", "best checkpoint deleted", "kept.add(min(known, key=self._metric.__getitem__))", "kept.add(max(known, key=self._metric.__getitem__))"),
  ("train/checkpoint", "oldest checkpoints kept", "steps[-self._keep :]", "steps[: self._keep]"),
  # --- data
  ("data/records", "more ranks than responses", "if len(ranks) != len(responses)", "if len(ranks) < len(responses)"),
  ("data/tokenize", "demonstrations one token too long", "len(response) + 1 > max_response_length", "len(response) > max_response_length"),
  ("data/tokenize", "EOS after answers that were cut off", "[tokenizer.eos_id] * (len(response) < max_response_length)", "[tokenizer.eos_id]"),
  ("data/tokenize", "ranks of answers that were dropped stay", "        ranks.append(rank)\n", "      ranks.append(rank)\n"),
  ("data/batching", "demonstrations without EOS", "[*item.prompt, *item.response, eos_id]", "[*item.prompt, *item.response]"),
  ("data/batching", "loss on prompts too", "num_prompt = [len(item.prompt) for item in demonstrations]", "num_prompt = [0 for item in demonstrations]"),
  ("data/batching", "documents without EOS", "[*document, eos_id], length", "[*document], length"),
  ("data/batching", "same order in each epoch", "default_rng((self._seed, epoch))", "default_rng((self._seed, 0))"),
  ("data/batching", "prompts padded on the right", "token_BP[row, length - len(prompt) :] = prompt", "token_BP[row, : len(prompt)] = prompt"),
  ("data/packing", "loss on the first token", "start + max(1, num_unweighted[index]) : stop", "start + num_unweighted[index] : stop"),
  ("data/packing", "positions run on in a row", "position_L[: stop - start]", "position_L[start:stop]"),
  ("data/packing", "segments share a number", "segment_BL[row, start:stop] = segment\n      position", "segment_BL[row, start:stop] = 1\n      position"),
  ("data/packing", "scores read a token early", "row * length + stop - 1", "row * length + stop - 2"),
  ("data/sources", "validation and training exchanged", '== (split == "validation")', '!= (split == "validation")'),
  ("data/sources", "split by chance", "text.encode()).digest()", "str(id(record)).encode()).digest()"),
]  # fmt: skip


def written(sources: dict[str, str]) -> tuple[list[Mutant], list[str]]:
  """The mutants, and a line for each whose text does not stand once in its module any more.

  Args:
    sources: module -> source.
  """
  found, stale = [], []
  for module, what, old, new in WRITTEN:
    count = sources[module].count(old)
    if count == 1 and old != new:
      found.append(Mutant(module, "written", what, old, new, sources[module].index(old), 0))
    else:
      stale.append(f"{module}: {what}: its text stands there {count} times: {old!r}")
  return found, stale
