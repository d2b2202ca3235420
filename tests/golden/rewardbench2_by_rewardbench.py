"""Writes rewardbench2.json: made-up scores, and what the package rewardbench makes of them.

Run from the project's root in an environment with rewardbench 0.1.4, datasets and pandas:

  python tests/golden/rewardbench2_by_rewardbench.py
"""

import importlib.metadata
import json
import pathlib
import random
import sys
import types
from unittest import mock

VERSION = "0.1.4"


def utils():
  """rewardbench.utils alone: the package's other modules import models that are not needed here."""
  folder = next(
    path for path in map(pathlib.Path, sys.path) if (path / "rewardbench" / "utils.py").is_file()
  )
  for name in ("rewardbench", "rewardbench.models", "fastchat", "fastchat.conversation"):
    sys.modules[name] = mock.MagicMock(spec=types.ModuleType(name))
  sys.modules["rewardbench.models"].REWARD_MODEL_CONFIG = {}
  sys.modules["fastchat.conversation"].Conversation = object
  module = types.ModuleType("rewardbench.utils")
  code = (folder / "rewardbench" / "utils.py").read_text(encoding="utf-8")
  exec(compile(code, "utils.py", "exec"), module.__dict__)
  return module


def main():
  import datasets

  if importlib.metadata.version("rewardbench") != VERSION:
    raise SystemExit(f"needs rewardbench {VERSION}")
  rng, theirs = random.Random(0), utils()
  best_of = [[round(rng.gauss(0, 1), 1) for _ in range(4)] for _ in range(40)]
  best_of += [[0.5, 0.5, 0.1, 0.2], [1.0] * 4, [0.1, 0.3, 0.3, 0.0]]
  flat = [score for row in best_of for score in row]
  frame = datasets.Dataset.from_dict({"text": ["x"] * len(flat), "scores": flat})
  credits = list(theirs.reroll_and_score_dataset(frame, [4] * len(best_of))["results"])
  ties = []
  for number in range(12):
    right = rng.randint(2, 5)
    good = [round(rng.gauss(2, 0.5), 2) for _ in range(right)]
    bad = [round(rng.gauss(0, 1), 2) for _ in range(rng.randint(2, 5))]
    if number == 3:
      good = [1.5] * right
    ties.append({"id": f"tied:{number}", "num_correct": right, "scores": good + bad})
    if number != 7:
      ties.append({"id": f"ref:{number}", "num_correct": 1, "scores": good[:1] + bad})
  _, score = theirs.process_single_model(ties)
  found = {
    "source": f"rewardbench {VERSION}: utils.reroll_and_score_dataset and utils.process_single_model",
    "when_to_update": "never; if RewardBench changes its score, say so in the documentation",
    "best_of": best_of,
    "credits": [float(value) for value in credits],
    "ties": ties,
    "ties_score": float(score),
  }
  path = pathlib.Path(__file__).with_name("rewardbench2.json")
  path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
