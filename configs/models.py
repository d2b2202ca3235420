"""Size presets: `--config=configs/ppo_ptx.py:tiny`. A preset changes the base only where it differs.

  tiny          the default: laptop, made-up task on real text (tiny.py)
  gpt2, smollm2_135m, llama3_8b
                shapes of released models, for weights that you have (released.py)
  gpt3_125m, gpt3_350m, gpt3_760m, gpt3_1p3b, gpt3_2p7b, gpt3_6p7b, gpt3_13b, gpt3_175b
                the paper's models and settings (gpt3.py)

No preset fetches anything: released shapes start from the weights that `--config.model.weights` names
and, without it, are trained from scratch like any other. All but `tiny` read records of your own:
`--config.data.documents=jsonl:PATH` and so on.
"""

from configs import base, gpt3, released, tiny

PRESETS = {"tiny": tiny.change, **released.PRESETS, **gpt3.PRESETS}


def get(stage: str, preset: str | None):
  """The config of a stage at a size; the smallest if none is named."""
  name = preset or "tiny"
  if name not in PRESETS:
    raise ValueError(f"preset {name!r} must be one of {', '.join(PRESETS)}")
  config = base.base(stage)
  config.preset = name
  PRESETS[name](config)
  return config
