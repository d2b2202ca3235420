r"""PPO-ptx, which is the paper's InstructGPT: PPO plus gamma times the pretraining gradient. This is the main job.

Paper: sec 3.5 eq. 2, C.4: gamma 27.8, 8 pretraining examples per episode, otherwise as in ppo.py. 60 petaflop/s-days
  at 175B (sec 5.1).
Does: pretrain -> reward_pretrain -> sft -> collect -> rm -> sft_select -> ppo_init -> ppo -> ppo_ptx -> ppo_beta0 ->
  evaluate. `ppo` and `ppo_beta0` (no KL penalty) serve for comparison. Ends with the paper's findings and a report.
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo

To start from weights that you have, on your own data. Preset `weights` takes the shape from the file (models.py lists
the others). The reward model starts from the same weights unless `reward_model.weights` names others.

  python -m instructjax.main --config=configs/ppo_ptx.py:weights --workdir=runs/mine \
    --config.model.weights=PATH --config.data.documents=jsonl:documents.jsonl.gz \
    --config.data.demonstrations=jsonl:demonstrations.jsonl \
    --config.data.comparisons=jsonl:rankings.jsonl --config.data.prompts=jsonl:prompts.jsonl
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo_ptx", preset)
