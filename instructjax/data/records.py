"""The four kinds of training record, and the checks that a raw JSON object must pass to become one.

`sources` calls `parse_record` on all data from outside; `demo` builds the dataclasses directly. Text is kept exactly as
it is, without stripping or adding anything; `tokenizer` describes how a response joins its prompt. A chat prompt stays
a list of messages until `sources.render` applies the tokenizer's chat template. docs/data.md shows every accepted form.

All private functions raise BadRecord. Imports nothing of the project but the errors.
"""

import dataclasses
import itertools
from typing import Any

from instructjax.core.errors import UserError

# Kind -> all keys that its accepted forms use. Readers of tables skip the other columns.
KEYS = {
  "documents": ("text",),
  "prompts": ("prompt", "messages"),
  "demonstrations": ("prompt", "response", "messages"),
  "comparisons": (
    "prompt",
    "responses",
    "ranks",
    "comparisons",
    "chosen",
    "rejected",
    "labeler",
  ),
}
KINDS = tuple(KEYS)
ROLES = ("system", "developer", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Document:
  """A text for language modelling."""

  text: str


@dataclasses.dataclass(frozen=True)
class Chat:
  """A prompt that consists of chat messages.

  Attributes:
    messages: (role, content) pairs with a role from ROLES; the last one is the user's. Which orders of roles are
      allowed is decided later, by the tokenizer's chat template.
  """

  messages: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt without an answer."""

  prompt: str | Chat


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A prompt and the answer that a demonstrator wrote."""

  prompt: str | Chat
  response: str


@dataclasses.dataclass(frozen=True)
class Ranking:
  """A prompt with two or more answers that one labeler has ranked.

  Attributes:
    prompt: the prompt.
    responses: the answers. Two of them may be equal, and an answer may be empty: policies do produce empty answers, and
      the reward model should learn how to score them.
    ranks: one positive integer per answer. 1 is best, equal ranks are ties, and gaps have no meaning.
    labeler: who ranked them; None if unknown.
  """

  prompt: str | Chat
  responses: tuple[str, ...]
  ranks: tuple[int, ...]
  labeler: str | None = None


Record = Document | Prompt | Demonstration | Ranking


class BadRecord(UserError):
  """An unusable record. The message is `file:line: reason`, and never quotes the text, which may be abusive."""


def parse_record(kind: str, obj: Any, where: str) -> Record:
  """Converts one decoded JSON value to a record.

  Unknown keys are ignored, so that published files can be loaded unchanged.

  Args:
    kind: one of KINDS. The accepted keys are:
      documents: text.
      prompts: prompt, or messages. Messages after the user's last one are dropped.
      demonstrations: prompt and response, or messages, of which the last is the response.
      comparisons: one of
        prompt, responses and ranks;
        prompt, responses and comparisons (see `ranks_from_pairs`);
        prompt, chosen and rejected;
        chosen and rejected as lists of messages that differ in the last message only. If there is a prompt as well, it
          must be the prompt of these messages.
        A labeler is optional.
      A prompt may also be a list of messages, and an answer a list of one message by the assistant. Messages have
      OpenAI's form, with a role and a content. The content is a string or a list of text parts.
    obj: the decoded line.
    where: `file:line`, for messages.

  Raises:
    BadRecord: the value is not a valid record; the message has `where` and the reason.
    ValueError: kind is not one of KINDS.
  """
  if not isinstance(obj, dict):
    raise BadRecord(f"{where}: must be a JSON object, got {type(obj).__name__}")
  if kind == "documents":
    return Document(_text(obj, "text", where))
  if kind == "prompts":
    return Prompt(_last_user_turn(obj, where) if "messages" in obj else _prompt(obj, where))
  if kind == "demonstrations":
    return _demonstration(obj, where)
  if kind == "comparisons":
    return _ranking(obj, where)
  raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")


def ranks_from_pairs(num_responses: int, pairs: Any, where: str) -> tuple[int, ...]:
  """Computes ranks from pairwise judgements.

  An answer's rank is 1 + the number of answers with more wins, where a tie counts as half a win. Every pair must be
  judged exactly once, because win counts are only comparable between answers with the same number of opponents.

  Judgements may contradict any ranking. The win count then smooths them: a cycle a > b > c > a becomes a three-way tie,
  and a tied pair becomes a preference if its answers have different results against the others.

  Args:
    num_responses: K, the number of answers.
    pairs: K(K-1)/2 objects {"a": index, "b": index, "winner": one of the two, or null for a tie}.
    where: `file:line`, for messages.
  Raises:
    BadRecord: pairs has another form, or does not contain every pair exactly once.
  """
  if not isinstance(pairs, list):
    raise BadRecord(f"{where}: 'comparisons' must be a list, got {type(pairs).__name__}")
  twice_wins = [0] * num_responses  # twice the number of wins, so that half a win is an integer
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


def _demonstration(obj: dict[str, Any], where: str) -> Demonstration:
  if "messages" not in obj:
    return Demonstration(_prompt(obj, where), _answer(obj, "response", where))
  if "response" in obj:
    raise BadRecord(f"{where}: has both messages and response")
  return Demonstration(*_dialogue(obj["messages"], "messages", where))


def _ranking(obj: dict[str, Any], where: str) -> Ranking:
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
    return Ranking(*_chosen_rejected(obj, where), (1, 2), labeler)
  prompt, responses = _prompt(obj, where), _responses(obj, where)
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


def _chosen_rejected(obj: dict[str, Any], where: str) -> tuple[str | Chat, tuple[str, str]]:
  """(prompt, (chosen, rejected)) of a row that gives them separately or as two whole dialogues."""
  pair = [_value(obj, key, where) for key in ("chosen", "rejected")]
  lists = all(isinstance(value, list) for value in pair)
  # Lists of one message beside a prompt are answers; longer lists are dialogues that contain the prompt.
  if not lists or ("prompt" in obj and max(map(len, pair)) == 1):
    chosen, rejected = (
      _answer(obj, key, where, may_be_empty=True) for key in ("chosen", "rejected")
    )
    return _prompt(obj, where), (chosen, rejected)
  (prompt, chosen), (other, rejected) = (
    _dialogue(value, key, where, may_be_empty=True)
    for value, key in zip(pair, ("chosen", "rejected"), strict=True)
  )
  if prompt != other:
    raise BadRecord(f"{where}: 'chosen' and 'rejected' differ before their last message")
  contents = [content for _, content in prompt.messages]
  # Published data sets repeat one of the messages as `prompt`.
  if "prompt" in obj and _prompt(obj, where) not in (prompt, *contents):
    raise BadRecord(f"{where}: 'prompt' is not what 'chosen' and 'rejected' answer")
  return prompt, (chosen, rejected)


def _responses(obj: dict[str, Any], where: str) -> tuple[str, ...]:
  responses = obj.get("responses")
  if not isinstance(responses, list) or len(responses) < 2:
    raise BadRecord(f"{where}: 'responses' must be a list of at least 2 strings")
  return tuple(
    _checked_answer(value, f"responses[{i}]", where, may_be_empty=True)
    for i, value in enumerate(responses)
  )


def _prompt(obj: dict[str, Any], where: str) -> str | Chat:
  if isinstance(obj.get("prompt"), list):
    return _chat(_messages(obj["prompt"], "prompt", where), "prompt", where)
  return _text(obj, "prompt", where)


def _last_user_turn(obj: dict[str, Any], where: str) -> Chat:
  messages = _messages(obj["messages"], "messages", where)
  while messages and messages[-1][0] != "user":
    messages.pop()
  return _chat(messages, "messages", where)


def _dialogue(value: Any, name: str, where: str, may_be_empty: bool = False) -> tuple[Chat, str]:
  """Splits messages into (prompt, answer). The answer is the last message, which must be the assistant's."""
  *before, (role, answer) = _messages(value, name, where)
  if role != "assistant":
    raise BadRecord(f"{where}: {name!r} must end in the assistant's answer, not in role {role}")
  prompt = _chat(before, name, where)
  return prompt, _checked_text(answer, f"{name}[{len(before)}].content", where, may_be_empty)


def _chat(messages: list[tuple[str, str]], name: str, where: str) -> Chat:
  """Makes a prompt of messages, which must end with the user's.

  This rule is the same for every kind of record. A row therefore yields the same prompt whatever it is read as, and
  falls on the same side of the validation split.
  """
  if not messages or messages[-1][0] != "user":
    raise BadRecord(f"{where}: {name!r} must have a message of the user right before the answer")
  _checked_text(messages[-1][1], f"{name}[{len(messages) - 1}].content", where)
  return Chat(tuple(messages))


def _messages(value: Any, name: str, where: str) -> list[tuple[str, str]]:
  if not isinstance(value, list) or not value:
    found = "an empty one" if value == [] else type(value).__name__
    raise BadRecord(f"{where}: {name!r} must be a list of messages, got {found}")
  return [_message(message, f"{name}[{i}]", where) for i, message in enumerate(value)]


def _message(message: Any, name: str, where: str) -> tuple[str, str]:
  """(role, content) of one message. The content may be empty, because system messages sometimes are."""
  if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
    found = type(message).__name__
    if isinstance(message, dict):
      found = "only " + (", ".join(map(repr, message)) or "{}")
    raise BadRecord(f"{where}: {name!r} must be an object with role and content, got {found}")
  role, content = message["role"], message["content"]
  if role not in ROLES:
    raise BadRecord(f"{where}: role of {name!r} must be one of {', '.join(ROLES)}")
  if message.get("tool_calls") or message.get("function_call"):
    raise BadRecord(f"{where}: {name!r} calls a tool, which cannot be trained on")
  if isinstance(content, list):  # OpenAI's content parts
    parts = [part if isinstance(part, dict) else {} for part in content]
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
      raise BadRecord(f"{where}: content of {name!r} has a part that is not text")
    content = "".join(part["text"] for part in parts)
  return role, _checked_text(content, f"{name}.content", where, may_be_empty=True)


def _answer(obj: dict[str, Any], key: str, where: str, may_be_empty: bool = False) -> str:
  return _checked_answer(_value(obj, key, where), key, where, may_be_empty)


def _checked_answer(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
  if isinstance(value, list):
    messages = _messages(value, name, where)
    if len(messages) > 1 or messages[0][0] != "assistant":
      raise BadRecord(f"{where}: {name!r} must be a string or one message of the assistant")
    value = messages[0][1]
  return _checked_text(value, name, where, may_be_empty)


def _text(obj: dict[str, Any], key: str, where: str) -> str:
  return _checked_text(_value(obj, key, where), key, where)


def _value(obj: dict[str, Any], key: str, where: str) -> Any:
  if key not in obj:
    raise BadRecord(
      f"{where}: {key!r} is missing (keys found: {', '.join(map(repr, obj)) or 'none'})"
    )
  return obj[key]


def _checked_text(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
  if not isinstance(value, str):
    raise BadRecord(f"{where}: {name!r} must be a string, got {type(value).__name__}")
  if not may_be_empty and not value.strip():
    raise BadRecord(f"{where}: {name!r} is empty")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON escapes can spell one half of a surrogate pair
    raise BadRecord(
      f"{where}: {name!r} is not valid Unicode (character {error.start + 1})"
    ) from error
  return value


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # JSON's true is an int in Python
