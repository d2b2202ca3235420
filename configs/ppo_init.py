"""Stage `ppo_init`."""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo_init", preset)
