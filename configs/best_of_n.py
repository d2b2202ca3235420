r"""Best-of-n (rejection sampling): a policy answers each training prompt n times, and the reward model chooses.

Not in the paper, which trains with PPO. The chosen answers are demonstrations that `sft` can learn from.
Does: what the policy and the reward model come from, then best_of_n. It writes WORKDIR/best_of_n/answers.jsonl.

  python -m instructjax.main --config=configs/best_of_n.py --workdir=runs/demo \
    --config.best_of_n.n=16 --config.best_of_n.num_prompts=1000

The chosen answers as demonstrations, in a folder of its own:

  python -m instructjax.main --config=configs/sft.py --workdir=runs/chosen \
    --config.data.demonstrations=jsonl:runs/demo/best_of_n/answers.jsonl
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("best_of_n", preset)
