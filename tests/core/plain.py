"""The default config as nested dicts, for tests to change. Called by the tests of config and blocks."""

import importlib


def load(stage: str = "ppo_ptx", preset: str | None = None):
  return importlib.import_module(f"configs.{stage}").get_config(preset)


def changed(**values):
  """The default config with dotted fields changed, `__` standing for the dot."""
  plain = load().to_dict()
  for name, value in values.items():
    *blocks, field = name.split("__")
    block = plain
    for key in blocks:
      block = block[key]
    block[field] = value
  return plain
