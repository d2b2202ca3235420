"""Stage `evaluate`."""

from configs import models


def get_config(preset: str | None = None):
  return models.get("evaluate", preset)
