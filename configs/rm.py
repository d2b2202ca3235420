"""Stage `rm`."""

from configs import models


def get_config(preset: str | None = None):
  return models.get("rm", preset)
