"""Stage `ppo`."""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo", preset)
