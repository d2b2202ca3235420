"""The default preset: public-domain text, an instruction task on it, and simulated labelers.

Called by the source registry of `instructjax.data` only, so a user's own data takes the same road.
Everything is a pure function of its arguments and the seed; nothing here imports jax.
"""

from __future__ import annotations

from instructjax.core.errors import UserError
from instructjax.data.demo import task, text
from instructjax.data.demo.labelers import agreement as labeler_agreement
from instructjax.data.demo.labelers import collect_rankings
from instructjax.data.demo.task import few_shot_prompt, gold_components, gold_score, names_topic
from instructjax.data.records import Demonstration, Document, Prompt

__all__ = [
  "collect_rankings",
  "few_shot_prompt",
  "gold_components",
  "gold_score",
  "labeler_agreement",
  "load",
  "names_topic",
]

KINDS = ("documents", "prompts", "demonstrations")


def load(kind: str, split: str, seed: int) -> list[Document] | list[Prompt] | list[Demonstration]:
  """Records of the default preset.

  Args:
    kind: 'documents' (chapters, in text order), 'prompts' (in an order drawn by the seed) or
      'demonstrations' (several a prompt, drawn by the seed).
    split: 'train' or 'validation'; prompts and demonstrations also have 'test'.
    seed: any non-negative integer.
  """
  if kind == "documents":
    return [Document(text=document) for document in text.documents(split)]
  if kind == "prompts":
    prompts = task.prompts(split)
    order = task.keyed_rng(seed, "prompts", split).permutation(len(prompts))
    return [Prompt(prompt=prompts[i]) for i in order]
  if kind == "demonstrations":
    return task.demonstrations(split, seed)
  raise UserError(f"kind={kind!r} of the default preset's data must be one of {list(KINDS)}")
