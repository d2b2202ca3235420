"""Texts to tokens as EleutherAI's lm-evaluation-harness encodes them, so that its numbers and ours are comparable.

Called by language_model.py. Pure functions; imports no model.
"""

from collections.abc import Sequence

from instructjax.core.errors import UserError
from instructjax.data.controls import Rendered
from instructjax.data.tokenizer import Tokenizer, prompt_ids


def prefix_id(tokenizer: Tokenizer) -> int:
  """The token before a text that has nothing before it: BOS if the tokenizer's files name one, else EOS."""
  if tokenizer.bos_id is not None:
    return tokenizer.bos_id
  bos = tokenizer.chats.special.bos_text
  ids = tokenizer.encode_prompt(bos) if bos else []
  return ids[0] if len(ids) == 1 else tokenizer.eos_id


def pair_ids(
  tokenizer: Tokenizer, context: str, continuation: str, first_id: int
) -> tuple[list[int], list[int]]:
  """Ids of a context and of what continues it.

  Spaces at the end of the context move into the continuation, because a word's token begins with its space. The two are
  encoded together, and the continuation is what comes after as many tokens as the context alone has.

  Args:
    tokenizer: of the model.
    context: may be empty. Control tokens are recognised if a chat template made it.
    continuation: what is scored.
    first_id: stands before a continuation without a context; see `prefix_id`.
  Raises:
    UserError: the continuation is empty, or adds no token.
  """
  if not continuation:
    raise UserError(f"a continuation must hold text, and one is empty, after {context[-40:]!r}")
  if not context:
    ids = tokenizer.encode(continuation)
    return ([first_id], ids) if ids[:1] != [first_id] else (ids[:1], ids[1:])
  whole_text, bare = context + continuation, context.rstrip()
  if isinstance(context, Rendered):  # which methods of `str` do not keep
    whole_text, bare = Rendered(whole_text), Rendered(bare)
  whole, before = prompt_ids(tokenizer, whole_text), prompt_ids(tokenizer, bare)
  after = whole[len(before) :]
  if not after:
    raise UserError(
      f"the continuation {continuation[:40]!r} adds no token to its context, which ends in {context[-40:]!r}"
    )
  return before or [first_id], after


def windows(ids: Sequence[int], first_id: int, length: int) -> list[tuple[list[int], list[int]]]:
  """Cuts a text into parts of at most `length` predicted tokens: (what is read before, what is predicted).

  Every token is predicted once. The first window follows `first_id`. A last one that is shorter reads as many tokens
  before it as there is room for, so that its tokens have a full context.
  """
  result = []
  for start in range(0, len(ids), length):
    stop = min(start + length, len(ids))
    if start == 0:
      result.append(([first_id], list(ids[:stop])))
      continue
    # `length` tokens are read, and the last of the predicted ones is not among them.
    result.append((list(ids[max(0, stop - length - 1) : start]), list(ids[start:stop])))
  return result
