"""Converts records to token ids, and drops those that are too long. Dropped records are counted and logged.

Called by stages/run_data.py, which puts documents and demonstrations into the token cache, and by stage `rm`.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.data.records import Chat, Demonstration, Document, Prompt, Ranking
from instructjax.data.token_store import Encoded
from instructjax.data.tokenizer import Tokenizer, prompt_ids

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RankingTokens:
  """Token ids of a ranking. A response ends in EOS unless it was cut off at the length limit."""

  prompt: list[int]
  responses: list[list[int]]
  ranks: list[int]
  labeler: str | None


def tokenize_prompts(
  records: Sequence[Prompt], tokenizer: Tokenizer, *, max_prompt_length: int
) -> list[list[int]]:
  """Tokenizes prompts, and drops those longer than max_prompt_length tokens (App. C).

  This and the following functions log how much they drop: long_prompts counts dropped records and, where there are
  responses, long_responses counts dropped responses.

  Raises:
    UserError: every prompt is too long.
  """
  _note_control_tokens("prompts", records, tokenizer)
  prompts = [prompt_ids(tokenizer, _text(record.prompt)) for record in records]
  kept = [prompt for prompt in prompts if len(prompt) <= max_prompt_length]
  report("prompts", len(kept), {"long_prompts": len(prompts) - len(kept)})
  return kept


def tokenize_documents(records: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
  """Ids of documents, each with an EOS at its end, and a BOS first if the tokenizer has one."""
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  for record in records:
    yield Encoded([*bos, *tokenizer.encode(record.text), tokenizer.eos_id])


def tokenize_demonstrations(
  records: Sequence[Demonstration],
  tokenizer: Tokenizer,
  left_out: dict[str, int],
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> Iterator[Encoded]:
  """Ids of demonstrations: prompt, response and EOS. Those that are too long are dropped.

  A response that exceeds max_response_length tokens with its EOS is dropped rather than cut, because a cut response
  would teach the policy to stop in the middle.

  Args:
    records: demonstrations.
    tokenizer: the run's.
    left_out: counts what is dropped; to be given to `report` at the end.
    max_prompt_length, max_response_length: the longest that are kept, in tokens.
  Raises:
    UserError: every demonstration is too long.
  """
  _note_control_tokens("demonstrations", records, tokenizer)
  left_out |= {"long_prompts": 0, "long_responses": 0}
  kept = 0
  for record in records:
    prompt = prompt_ids(tokenizer, _text(record.prompt))
    response = tokenizer.encode(record.response)
    if len(prompt) > max_prompt_length:
      left_out["long_prompts"] += 1
    elif len(response) + 1 > max_response_length:
      left_out["long_responses"] += 1
    else:
      kept += 1
      yield Encoded([*prompt, *response, tokenizer.eos_id], len(prompt))
  if not kept:
    report("demonstrations", kept, left_out)


def tokenize_rankings(
  records: Sequence[Ranking],
  tokenizer: Tokenizer,
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> list[RankingTokens]:
  """Tokenizes rankings, and drops answers and prompts that are too long.

  A response of exactly max_response_length tokens gets no EOS, because a policy's answer of that length was cut off
  there. A longer response is removed from its ranking. A ranking with fewer than two answers left is dropped.

  Raises:
    UserError: nothing is left because everything is too long.
  """
  _note_control_tokens("comparisons", records, tokenizer)
  kept = []
  long_prompts = long_responses = 0
  for record in records:
    prompt = prompt_ids(tokenizer, _text(record.prompt))
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
  left_out = {"long_prompts": long_prompts, "long_responses": long_responses}
  report("comparisons", len(kept), left_out)
  return kept


def _text(prompt: str | Chat) -> str:
  if isinstance(prompt, Chat):
    raise ValueError("a chat must be made text first; see sources.render")
  return prompt


def _note_control_tokens(kind: str, records: Sequence, tokenizer: Tokenizer):
  """Says how many prompts spell a control token, which they do in vain.

  They may be texts that somebody put through a chat template before.
  """
  pattern = tokenizer.control_pattern
  if pattern is None:
    return
  texts = (_text(record.prompt) for record in records)
  found = [
    match[0]
    for text in texts
    if not isinstance(text, Rendered)
    for match in [pattern.search(text)]
    if match
  ]
  if found:
    logger.warning(
      "%s: %d of %d prompts spell a control token, as %r, and are read as plain text; give chats as"
      " lists of messages",
      kind,
      len(found),
      len(records),
      found[0],
    )


def report(kind: str, kept: int, left_out: Mapping[str, int]):
  """Logs how many records were dropped for their length.

  Raises:
    UserError: no record is left.
  """
  reasons = ", ".join(f"{name}={count}" for name, count in left_out.items())
  if any(left_out.values()):
    counts = {name.removeprefix("long_"): count for name, count in left_out.items() if count}
    what = " and ".join(
      f"{count} {name if count > 1 else name.removesuffix('s')}" for name, count in counts.items()
    )
    logger.warning("%s: left out because too long: %s; %d are kept", kind, what, kept)
  if not kept and any(left_out.values()):
    raise UserError(
      f"{kind}: every record is too long ({reasons});"
      " raise data.max_prompt_length or data.max_response_length"
    )
