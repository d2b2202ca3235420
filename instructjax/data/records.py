"""The four kinds of training record, and the checks a raw JSON object must pass to become one.

`sources` calls `parse_record` on everything that comes from outside; `demo` builds the dataclasses
itself. Imports nothing of the project. Text is taken exactly as it is: nothing is stripped or added
(`tokenizer` says how a response joins its prompt).
"""

import dataclasses
import itertools
from typing import Any

KINDS = ("documents", "prompts", "demonstrations", "comparisons")


@dataclasses.dataclass(frozen=True)
class Document:
  """A text for language modelling."""

  text: str


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt that nobody has answered."""

  prompt: str


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A prompt and the answer a demonstrator wrote."""

  prompt: str
  response: str


@dataclasses.dataclass(frozen=True)
class Ranking:
  """A prompt with two or more answers ranked by one labeler.

  Attributes:
    prompt: what was asked.
    responses: the answers. Two may be the same text, and one may be empty: policies do say nothing,
      and a reward model should learn what that is worth.
    ranks: one positive integer an answer, 1 is best, equal ranks are ties; gaps mean nothing.
    labeler: who ranked them, where known.
  """

  prompt: str
  responses: tuple[str, ...]
  ranks: tuple[int, ...]
  labeler: str | None = None


Record = Document | Prompt | Demonstration | Ranking


class BadRecord(ValueError):
  """An unusable record: `file:line: reason`, never the record's text, which may be abusive."""


def parse_record(kind: str, obj: Any, where: str) -> Record:
  """Makes a record of one decoded JSON value, or says why it cannot.

  Keys that no rule names are ignored, so that published files load as they are.

  Args:
    kind: one of KINDS. Accepted keys:
      documents: text.
      prompts: prompt.
      demonstrations: prompt, response.
      comparisons: prompt, and one of (responses, ranks), (responses, comparisons), (chosen,
        rejected); see `ranks_from_pairs` for the second. Optional: labeler.
    obj: the decoded line.
    where: `file:line`, for messages.

  Raises:
    BadRecord: with `where` and the reason.
  """
  if not isinstance(obj, dict):
    raise BadRecord(f"{where}: must be a JSON object, got {type(obj).__name__}")
  if kind == "documents":
    return Document(_text(obj, "text", where))
  if kind == "prompts":
    return Prompt(_text(obj, "prompt", where))
  if kind == "demonstrations":
    return Demonstration(_text(obj, "prompt", where), _text(obj, "response", where))
  if kind == "comparisons":
    return _ranking(obj, where)
  raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")


def ranks_from_pairs(num_responses: int, pairs: Any, where: str) -> tuple[int, ...]:
  """Ranks from judged pairs: rank = 1 + number of answers with more wins, a tie being half a win.

  Every pair must be judged exactly once: win counts compare only answers that met the same
  opponents. Judgements that no ranking can hold are kept and smoothed by the count: a cycle
  a > b > c > a becomes a three-way tie, and a tied pair whose answers fared differently against the
  others becomes a preference.

  Args:
    num_responses: K.
    pairs: K(K-1)/2 of {"a": index, "b": index, "winner": one of the two, or null for a tie}.
    where: `file:line`, for messages.
  """
  if not isinstance(pairs, list):
    raise BadRecord(f"{where}: 'comparisons' must be a list, got {type(pairs).__name__}")
  twice_wins = [0] * num_responses  # doubled, so that a tie's half stays an integer
  judged = set()
  for pair in pairs:
    if not isinstance(pair, dict) or not {"a", "b", "winner"} <= pair.keys():
      raise BadRecord(f"{where}: each of 'comparisons' must be an object with a, b and winner")
    a, b, winner = pair["a"], pair["b"], pair["winner"]
    if not (
      _is_int(a) and _is_int(b) and 0 <= a < num_responses and 0 <= b < num_responses and a != b
    ):
      raise BadRecord(
        f"{where}: a and b of a comparison must be two different indices below {num_responses}"
      )
    if winner is not None and not (_is_int(winner) and winner in (a, b)):
      raise BadRecord(f"{where}: winner of a comparison must be its a={a}, its b={b} or null")
    if frozenset((a, b)) in judged:
      raise BadRecord(f"{where}: responses {min(a, b)} and {max(a, b)} are compared twice")
    judged.add(frozenset((a, b)))
    for index in (a, b):
      twice_wins[index] += 1 if winner is None else 2 * (winner == index)
  for a, b in itertools.combinations(range(num_responses), 2):
    if frozenset((a, b)) not in judged:
      raise BadRecord(f"{where}: responses {a} and {b} are not compared; every pair must be")
  return tuple(1 + sum(other > wins for other in twice_wins) for wins in twice_wins)


def _ranking(obj: dict[str, Any], where: str) -> Ranking:
  prompt = _text(obj, "prompt", where)
  labeler = obj.get("labeler")
  if labeler is not None and not isinstance(labeler, str):
    raise BadRecord(f"{where}: 'labeler' must be a string, got {type(labeler).__name__}")
  forms = [
    form
    for form in (("ranks",), ("comparisons",), ("chosen", "rejected"))
    if obj.keys() & set(form)
  ]
  if len(forms) != 1:
    found = " and ".join("/".join(form) for form in forms) or "none"
    raise BadRecord(
      f"{where}: needs exactly one of ranks, comparisons or chosen/rejected, got {found}"
    )
  if forms[0] == ("chosen", "rejected"):
    if "responses" in obj:
      raise BadRecord(f"{where}: has both responses and chosen/rejected")
    answers = tuple(_text(obj, key, where, may_be_empty=True) for key in ("chosen", "rejected"))
    return Ranking(prompt, answers, (1, 2), labeler)
  responses = _responses(obj, where)
  if forms[0] == ("comparisons",):
    return Ranking(
      prompt, responses, ranks_from_pairs(len(responses), obj["comparisons"], where), labeler
    )
  ranks = obj["ranks"]
  if not isinstance(ranks, list) or not all(_is_int(rank) and rank >= 1 for rank in ranks):
    raise BadRecord(f"{where}: 'ranks' must be a list of integers >= 1")
  if len(ranks) != len(responses):
    raise BadRecord(f"{where}: {len(responses)} responses but {len(ranks)} ranks")
  return Ranking(prompt, responses, tuple(ranks), labeler)


def _responses(obj: dict[str, Any], where: str) -> tuple[str, ...]:
  responses = obj.get("responses")
  if not isinstance(responses, list) or len(responses) < 2:
    raise BadRecord(f"{where}: 'responses' must be a list of at least 2 strings")
  return tuple(
    _checked_text(text, f"responses[{i}]", where, may_be_empty=True)
    for i, text in enumerate(responses)
  )


def _text(obj: dict[str, Any], key: str, where: str, may_be_empty: bool = False) -> str:
  if key not in obj:
    raise BadRecord(
      f"{where}: {key!r} is missing (keys found: {', '.join(map(repr, obj)) or 'none'})"
    )
  return _checked_text(obj[key], key, where, may_be_empty)


def _checked_text(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
  if not isinstance(value, str):
    raise BadRecord(f"{where}: {name!r} must be a string, got {type(value).__name__}")
  if not may_be_empty and not value.strip():
    raise BadRecord(f"{where}: {name!r} is empty")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
    raise BadRecord(
      f"{where}: {name!r} is not valid Unicode (character {error.start + 1})"
    ) from error
  return value


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # JSON true is an int to Python
