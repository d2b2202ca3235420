"""Size presets, chosen as in `--config=configs/ppo_ptx.py:tiny`. A preset lists only what differs from base.py.

  tiny          the default: a simulated task on real text, for a laptop (tiny.py)
  smollm2       the whole recipe with a real model, SmolLM2-135M-Instruct, on two CPU cores (smollm2.py)
  gpt2, smollm2_135m, llama3_8b, llama3_70b
                shapes of released models, for weights that you have (released.py)
  weights       the shape of the file that --config.model.weights names, with the paper's settings for that size
                (weights.py)
  gpt3_125m, gpt3_350m, gpt3_760m, gpt3_1p3b, gpt3_2p7b, gpt3_6p7b, gpt3_13b, gpt3_175b
                the paper's models and settings (gpt3.py)

No preset downloads anything. The released shapes start from the weights in `--config.model.weights`; without it, they
are trained from scratch like all others. Every preset except `tiny` and `smollm2` needs your own data, named by
`--config.data.documents=jsonl:PATH` and so on.
"""

from configs import base, gpt3, released, smollm2, tiny, weights

PRESETS = {"tiny": tiny.change, "smollm2": smollm2.change, **released.PRESETS, **gpt3.PRESETS}


def get(stage: str, preset: str | None):
  """The config of a stage at the size of a preset; None is `tiny`.

  Raises:
    ValueError: there is no such preset. The --config flag shows the message to the user.
  """
  name = preset or "tiny"
  if name not in PRESETS and name != weights.NAME:
    raise ValueError(f"preset {name!r} must be one of {', '.join([*PRESETS, weights.NAME])}")
  config = base.base(stage)
  config.preset = name
  if name != weights.NAME:  # which is filled in when the flags are known
    PRESETS[name](config)
  return config
