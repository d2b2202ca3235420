"""The data of the default preset: public-domain text, an instruction task on that text, and simulated labelers.

Only the registry of sources imports this package, so that a user's own data goes through the same code. All functions
are pure functions of their arguments and the seed. Nothing here imports JAX.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pathlib

from instructjax.data import bible
from instructjax.data.demo import task, text
from instructjax.data.demo.labelers import agreement as labeler_agreement
from instructjax.data.demo.labelers import collect_rankings
from instructjax.data.demo.task import (
  GOLD_WORDS,
  few_shot_prompt,
  gold_components,
  gold_score,
  is_new_topic,
  names_topic,
  topic_count,
)
from instructjax.data.records import Demonstration, Document, Prompt

__all__ = [
  "GOLD_WORDS",
  "checksum",
  "collect_rankings",
  "echo",
  "few_shot_prompt",
  "gold_components",
  "gold_score",
  "is_new_topic",
  "labeler_agreement",
  "load",
  "names_topic",
  "score_without_base",
  "topic_count",
]

KINDS = ("documents", "prompts", "demonstrations")
READS_BASE = False  # the gold score needs no network
score_without_base = gold_score


def load(kind: str, split: str, seed: int) -> list[Document] | list[Prompt] | list[Demonstration]:
  """Returns records of the default preset.

  Args:
    kind: 'documents' (chapters in the order of the text), 'prompts' (shuffled by the seed) or 'demonstrations' (several
      for each prompt, drawn by the seed).
    split: 'train' or 'validation'. Prompts and demonstrations also have 'test'.
    seed: any non-negative integer.
  Raises:
    UserError: the package with the text is not installed.
    ValueError: there is no such kind or split.
  """
  if kind == "documents":
    return [Document(text=document) for document in text.documents(split)]
  if kind == "prompts":
    prompts = task.prompts(split)
    order = task.keyed_rng(seed, "prompts", split).permutation(len(prompts))
    # Prompts on new topics last, so that a few test prompts are on those of training.
    new_last = sorted(order.tolist(), key=lambda i: task.is_new_topic(prompts[i]))
    return [Prompt(prompt=prompts[i]) for i in new_last]
  if kind == "demonstrations":
    return task.demonstrations(split, seed)
  raise ValueError(f"kind={kind!r} of the default preset's data must be one of {list(KINDS)}")


def echo(prompt: str) -> str:
  """The prompt as an answer to itself."""
  return prompt.strip()


def checksum() -> str:
  """The version of the package with the text, and a hash of the code that generates the task from it."""
  code = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
    code.update(path.read_bytes())
  distribution = bible.PACKAGE.replace("_", "-")
  return f"{distribution}:{importlib.metadata.version(distribution)} task:{code.hexdigest()[:16]}"
