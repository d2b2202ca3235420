"""Converts records to token ids, and drops those that are too long. How many, and the first one's place, is logged.

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


LeftOut = dict[str, tuple[int, str]]  # reason -> (how many, `file:line` of the first one or '')


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

  This and the following functions log how much they drop: long_prompts are dropped records and, where there are
  responses, long_responses are dropped responses.

  Raises:
    UserError: every prompt is too long.
  """
  _note_control_tokens("prompts", records, tokenizer)
  prompts = [prompt_ids(tokenizer, _text(record.prompt)) for record in records]
  left_out: LeftOut = {}
  kept = []
  for record, prompt in zip(records, prompts, strict=True):
    if len(prompt) <= max_prompt_length:
      kept.append(prompt)
    else:
      _leave_out(left_out, "long_prompts", record.where)
  report("prompts", len(kept), left_out)
  return kept


def tokenize_documents(records: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
  """Ids of documents, each with an EOS at its end, and a BOS first if the tokenizer has one."""
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  for record in records:
    yield Encoded([*bos, *tokenizer.encode(record.text), tokenizer.eos_id])


def tokenize_demonstrations(
  records: Sequence[Demonstration],
  tokenizer: Tokenizer,
  left_out: LeftOut,
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
    left_out: takes what is dropped; to be given to `report` at the end.
    max_prompt_length, max_response_length: the longest that are kept, in tokens.
  Raises:
    UserError: every demonstration is too long.
  """
  _note_control_tokens("demonstrations", records, tokenizer)
  kept = 0
  for record in records:
    prompt = prompt_ids(tokenizer, _text(record.prompt))
    response = tokenizer.encode(record.response)
    if len(prompt) > max_prompt_length:
      _leave_out(left_out, "long_prompts", record.where)
    elif len(response) + 1 > max_response_length:
      _leave_out(left_out, "long_responses", record.where)
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
  left_out: LeftOut = {}
  for record in records:
    prompt = prompt_ids(tokenizer, _text(record.prompt))
    if len(prompt) > max_prompt_length:
      _leave_out(left_out, "long_prompts", record.where)
      continue
    responses, ranks = [], []
    for text, rank in zip(record.responses, record.ranks, strict=True):
      response = tokenizer.encode(text)
      if len(response) <= max_response_length:
        responses.append(response + [tokenizer.eos_id] * (len(response) < max_response_length))
        ranks.append(rank)
    _leave_out(left_out, "long_responses", record.where, len(record.responses) - len(responses))
    if len(responses) >= 2:
      kept.append(RankingTokens(prompt, responses, ranks, record.labeler))
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


def _leave_out(left_out: LeftOut, why: str, where: str, count: int = 1):
  """Notes what is dropped of the record at `where`; 0 notes nothing."""
  if count:
    before, first = left_out.get(why, (0, where))
    left_out[why] = (before + count, first)


def report(kind: str, kept: int, left_out: Mapping[str, Sequence]):
  """Logs how many records were dropped for their length, and where the first one stands.

  Args:
    kind: kind of the records.
    kept: number of those that are left.
    left_out: see `LeftOut`; lists as read from a file will do.
  Raises:
    UserError: no record is left.
  """
  if not left_out:
    return
  parts = []
  for why, (count, first) in sorted(left_out.items()):
    name = why.removeprefix("long_")
    place = f" (first at {first})" if first and count > 1 else f" ({first})" if first else ""
    parts.append(f"{count} {name if count > 1 else name.removesuffix('s')}{place}")
  what = " and ".join(parts)
  if not kept:
    raise UserError(
      f"{kind}: every record is too long: {what}; raise data.max_prompt_length or data.max_response_length"
    )
  logger.warning("%s: left out because too long: %s; %d are kept", kind, what, kept)
