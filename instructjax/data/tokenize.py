"""Records to token ids, filtered by length; what is left out is counted and logged.

Called by the stages, whose batches are made of the results (batching.py).
"""

import dataclasses
import logging
from collections.abc import Sequence

from instructjax.core.errors import UserError
from instructjax.data.records import Chat, Demonstration, Prompt, Ranking
from instructjax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DemonstrationTokens:
  """Token ids of a demonstration; the response is without EOS, which `sft_batches` adds."""

  prompt: list[int]
  response: list[int]


@dataclasses.dataclass(frozen=True)
class RankingTokens:
  """Token ids of a ranking; a response ends in EOS unless it was cut off at the length limit."""

  prompt: list[int]
  responses: list[list[int]]
  ranks: list[int]
  labeler: str | None


def tokenize_prompts(
  records: Sequence[Prompt], tokenizer: Tokenizer, *, max_prompt_length: int
) -> tuple[list[list[int]], dict[str, int]]:
  """Token ids of the prompts of at most max_prompt_length tokens (App. C), and counts.

  Counts, here and below: kept (records), long_prompts (records), long_responses (responses).
  """
  prompts = [tokenizer.encode_prompt(_text(record.prompt)) for record in records]
  kept = [prompt for prompt in prompts if len(prompt) <= max_prompt_length]
  return kept, _report("prompts", len(kept), long_prompts=len(prompts) - len(kept))


def tokenize_demonstrations(
  records: Sequence[Demonstration],
  tokenizer: Tokenizer,
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> tuple[list[DemonstrationTokens], dict[str, int]]:
  """Token ids of the demonstrations that fit, and counts.

  One whose response and EOS exceed max_response_length tokens is left out: cut, it would teach to
  stop in the middle.
  """
  kept = []
  long_prompts = long_responses = 0
  for record in records:
    prompt = tokenizer.encode_prompt(_text(record.prompt))
    response = tokenizer.encode(record.response)
    if len(prompt) > max_prompt_length:
      long_prompts += 1
    elif len(response) + 1 > max_response_length:
      long_responses += 1
    else:
      kept.append(DemonstrationTokens(prompt, response))
  return kept, _report(
    "demonstrations", len(kept), long_prompts=long_prompts, long_responses=long_responses
  )


def tokenize_rankings(
  records: Sequence[Ranking],
  tokenizer: Tokenizer,
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> tuple[list[RankingTokens], dict[str, int]]:
  """Token ids of the rankings that fit, and counts.

  A response of exactly max_response_length tokens gets no EOS: a policy's answer that long was cut
  off there. A longer one leaves its ranking, and a ranking with fewer than two answers left is left
  out.
  """
  kept = []
  long_prompts = long_responses = 0
  for record in records:
    prompt = tokenizer.encode_prompt(_text(record.prompt))
    if len(prompt) > max_prompt_length:
      long_prompts += 1
      continue
    responses, ranks = [], []
    for text, rank in zip(record.responses, record.ranks, strict=True):
      response = tokenizer.encode(text)
      if len(response) <= max_response_length:
        responses.append(response + [tokenizer.eos_id] * (len(response) < max_response_length))
        ranks.append(rank)
    long_responses += len(record.responses) - len(responses)
    if len(responses) >= 2:
      kept.append(RankingTokens(prompt, responses, ranks, record.labeler))
  return kept, _report(
    "comparisons", len(kept), long_prompts=long_prompts, long_responses=long_responses
  )


def _text(prompt: str | Chat) -> str:
  if isinstance(prompt, Chat):
    raise ValueError("a chat must be made text first; see sources.render")
  return prompt


def _report(kind: str, kept: int, **left_out: int) -> dict[str, int]:
  """Logs what was left out for length and returns all counts; raises when nothing is kept."""
  reasons = ", ".join(f"{name}={count}" for name, count in left_out.items())
  if any(left_out.values()):
    logger.warning("%s: kept %d; left out for length: %s", kind, kept, reasons)
  if not kept and any(left_out.values()):
    raise UserError(
      f"{kind}: every record is too long ({reasons});"
      " raise data.max_prompt_length or data.max_response_length"
    )
  return {"kept": kept, **left_out}
