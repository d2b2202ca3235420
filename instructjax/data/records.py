"""The four kinds of training record, and the checks that a raw JSON object must pass to become one.

`sources` calls `parse_record` on all data from outside; `demo` builds the dataclasses directly. Text is kept exactly as
it is, without stripping or adding anything; `tokenizer` describes how a response joins its prompt. A chat prompt stays
a list of messages until `sources.render` applies the tokenizer's chat template. docs/data.md shows every accepted form.

All private functions raise BadRecord. Imports `messages`, which checks texts and chats, and `ranking`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from instructjax.data import messages, ranking
from instructjax.data.messages import BadRecord, checked_text, kind_of, listed, parse_answer

# Kind -> all keys that its accepted forms use. Readers of tables skip the other columns.
KEYS = {
  "documents": ("text",),
  "prompts": ("prompt", "messages", "user"),
  "demonstrations": ("prompt", "response", "messages"),
  "comparisons": (
    "prompt",
    "responses",
    "ranks",
    "response",
    "score",
    "scores",
    "comparisons",
    "chosen",
    "rejected",
    "labeler",
  ),
}
KINDS = tuple(KEYS)
# Keys that may hold a chat as JSON text.
_CHATS = (
  "prompt",
  "response",
  "chosen",
  "rejected",
  "messages",
)
_SPEAKER = re.compile(r"(\A|\n)(Human|Assistant|User|Q|A):\Z")
_SPEAKER_LENGTH = len("\nAssistant:")


def _place() -> str:
  """A field for the record's `file:line`. It takes no part in comparisons, because it is no part of the content."""
  return dataclasses.field(default="", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Document:
  """A text for language modelling."""

  text: str
  where: str = _place()


@dataclasses.dataclass(frozen=True)
class Chat:
  """A prompt that consists of chat messages.

  Attributes:
    messages: (role, content) pairs with a role from messages.ROLES; the last one is the user's. Which orders of roles
      are allowed is decided later, by the tokenizer's chat template.
  """

  messages: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt without an answer.

  Attributes:
    prompt: the prompt.
    user: who wrote it; None if unknown.
  """

  prompt: str | Chat
  where: str = _place()
  user: str | None = None


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A prompt and the answer that a demonstrator wrote."""

  prompt: str | Chat
  response: str
  where: str = _place()


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
  where: str = _place()


Record = Document | Prompt | Demonstration | Ranking


def parse_record(kind: str, obj: Any, where: str) -> Record:
  """Converts one decoded JSON value to a record.

  Unknown keys are ignored, so that published files can be loaded unchanged.

  Args:
    kind: one of KINDS. The accepted keys are:
      documents: text.
      prompts: prompt, or messages. Messages after the user's last one are dropped. A user, a string or a whole number,
        is optional.
      demonstrations: prompt and response, or messages, of which the last is the response.
      comparisons: one of
        prompt, responses and ranks;
        prompt, responses and scores, of which more is better;
        prompt, responses and comparisons (see `ranking.from_pairs`);
        prompt, chosen and rejected;
        chosen and rejected as lists of messages that differ in the last message only. If there is a prompt as well, it
          must be the prompt of these messages.
        A labeler, a string or a whole number, is optional.
      A prompt may also be a list of messages, and an answer a list of one message by the assistant, or the whole chat
      that begins with the prompt. `messages` describes their form. A chat may be stored as JSON text.
    obj: the decoded line.
    where: `file:line`, for messages.

  Raises:
    BadRecord: the value is not a valid record; the message has `where` and the reason.
    ValueError: kind is not one of KINDS.
  """
  if not isinstance(obj, dict):
    raise BadRecord(f"{where}: must be a JSON object, got {kind_of(obj)}")
  # A null is an absent key, as it is in a table, where every row has every column.
  obj = {
    key: messages.from_json_text(value, key, where) if key in _CHATS else value
    for key, value in obj.items()
    if value is not None
  }
  if kind == "documents":
    return Document(checked_text(_value(obj, "text", where), "text", where), where)
  if kind == "prompts":
    prompt = _last_user_turn(obj, where) if "messages" in obj else _prompt(obj, where)
    return Prompt(prompt, where, _who(obj, "user", where))
  if kind == "demonstrations":
    return _demonstration(obj, where)
  if kind == "comparisons":
    return _ranking(obj, where)
  raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")


def _demonstration(obj: dict[str, Any], where: str) -> Demonstration:
  if "messages" in obj:
    if "response" in obj:
      raise BadRecord(f"{where}: has both messages and response")
    found = messages.last_answer(
      messages.parse(obj["messages"], "messages", where), "messages", where
    )
    return Demonstration(*_split_dialogue(found, "messages", where), where)
  prompt = _prompt(obj, where)
  (answer,) = _own_answers(prompt, (_value(obj, "response", where),), ("response",), where)
  answer = parse_answer(answer, "response", where)
  if isinstance(prompt, str) and answer.startswith(prompt) and _ends_in_separator(prompt):
    answer = checked_text(answer[len(prompt) :], "response", where)
  return Demonstration(prompt, answer, where)


def _ranking(obj: dict[str, Any], where: str) -> Ranking:
  labeler = _who(obj, "labeler", where)
  forms: list[tuple[str, ...]] = [
    form
    for form in (("ranks",), ("comparisons",), ("chosen", "rejected"))
    if obj.keys() & set(form)
  ]
  if not forms and "scores" in obj:  # beside another form they say the same in other words
    forms = [("scores",)]
  if len(forms) != 1:
    found = " and ".join("/".join(form) for form in forms) or "none"
    raise BadRecord(
      f"{where}: needs exactly one of ranks, comparisons or chosen/rejected, got {found}"
    )
  if forms[0] == ("chosen", "rejected"):
    if "responses" in obj:
      raise BadRecord(f"{where}: has both responses and chosen/rejected")
    return Ranking(*_chosen_rejected(obj, where), (1, 2), labeler, where)
  prompt, responses = _prompt(obj, where), _responses(obj, where)
  if forms[0] == ("comparisons",):
    ranks = ranking.from_pairs(len(responses), obj["comparisons"], where)
  else:
    name = forms[0][0]
    ranks = (
      ranking.from_ranks(obj["ranks"], where)
      if name == "ranks"
      else ranking.from_scores(obj["scores"], where)
    )
    if len(ranks) != len(responses):
      raise BadRecord(f"{where}: {len(responses)} responses but {len(ranks)} {name}")
  return Ranking(prompt, responses, ranks, labeler, where)


def _who(obj: dict[str, Any], key: str, where: str) -> str | None:
  """The name of a person; None if there is none."""
  found = obj.get(key)
  if isinstance(found, int) and not isinstance(found, bool):  # a person's number
    found = _decimal(found, key, where)
  if found is not None and not isinstance(found, str):
    raise BadRecord(f"{where}: {key!r} must be a string, got {kind_of(found)}")
  return found


def parse_scored(obj: dict[str, Any], where: str) -> tuple[str | Chat, str, float]:
  """(prompt, answer, score) of a row that holds one answer; rankings are made of all the rows of a prompt.

  Raises:
    BadRecord: a value is missing or of another type.
  """
  answer = parse_answer(_value(obj, "response", where), "response", where, may_be_empty=True)
  if not ranking.is_score(obj.get("score")):
    raise BadRecord(f"{where}: 'score' must be a finite number")
  return _prompt(obj, where), answer, obj["score"]


def ranking_of_scored(prompt: str | Chat, answers: Sequence[tuple[str, float, str]]) -> Ranking:
  """The ranking of a prompt's answers, each with its score and place."""
  texts, scores, places = zip(*answers, strict=True)
  return Ranking(prompt, texts, ranking.from_scores(list(scores), places[0]), None, places[0])


def _chosen_rejected(obj: dict[str, Any], where: str) -> tuple[str | Chat, tuple[str, str]]:
  """(prompt, (chosen, rejected)) of a row that gives them separately or as two whole dialogues."""
  names = ("chosen", "rejected")
  pair = [_value(obj, key, where) for key in names]
  # Lists of one message beside a prompt are answers; longer lists are dialogues that contain the prompt.
  if not all(isinstance(value, list) for value in pair) or (
    "prompt" in obj and max(map(len, pair)) == 1
  ):
    prompt = _prompt(obj, where)
    pair = _own_answers(prompt, pair, names, where)
    chosen, rejected = (
      parse_answer(value, key, where, may_be_empty=True)
      for key, value in zip(names, pair, strict=True)
    )
    if isinstance(prompt, str) and repeats(prompt, (chosen, rejected)):
      chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
  else:
    parsed = [messages.parse(value, key, where) for key, value in zip(names, pair, strict=True)]
    if any(found[-1].trains is False for found in parsed):
      raise BadRecord(f"{where}: an answer is marked as not to be trained on")
    (prompt, chosen), (other, rejected) = (
      _split_dialogue(found, key, where, may_be_empty=True)
      for key, found in zip(names, parsed, strict=True)
    )
    if prompt != other:
      raise BadRecord(f"{where}: 'chosen' and 'rejected' differ before their last message")
    contents = [content for _, content in prompt.messages]
    # Published data sets repeat one of the messages as `prompt`.
    if "prompt" in obj and _prompt(obj, where) not in (prompt, *contents):
      raise BadRecord(f"{where}: 'prompt' is not what 'chosen' and 'rejected' answer")
  if chosen == rejected:
    raise BadRecord(f"{where}: 'chosen' and 'rejected' are the same answer")
  return prompt, (chosen, rejected)


def repeats(prompt: str, answers: Sequence[str]) -> bool:
  """Whether two answers are whole texts, which begin with the prompt.

  Both must begin with it. A short prompt, as 'Hi', must also end in a blank or a speaker's name: two answers that begin
  with 'Hi' are nothing special.
  """
  if not all(answer.startswith(prompt) for answer in answers):
    return False
  if _ends_in_separator(prompt):
    return True
  goes_on = any(answer[len(prompt) : len(prompt) + 1].isalnum() for answer in answers)
  return len(prompt.split()) >= 3 and not goes_on


def _ends_in_separator(prompt: str) -> bool:
  """Whether a prompt ends in what separates it from an answer: a blank, or the name of who speaks next."""
  return prompt[-1:].isspace() or bool(_SPEAKER.search(prompt[-_SPEAKER_LENGTH:]))


def _own_answers(
  prompt: str | Chat, values: Sequence[Any], names: Sequence[str], where: str
) -> list[Any]:
  """Answers without the chat prompt, if they are whole chats that begin with it."""
  if not isinstance(prompt, Chat):
    return list(values)
  result = []
  for name, value in zip(names, values, strict=True):
    if isinstance(value, list) and len(value) == len(prompt.messages) + 1:
      pairs = tuple(found[:2] for found in messages.parse(value, name, where))
      if pairs[:-1] != prompt.messages:
        raise BadRecord(f"{where}: 'prompt' is not what {name!r} answers")
      value = value[-1:]
    result.append(value)
  return result


def _responses(obj: dict[str, Any], where: str) -> tuple[str, ...]:
  responses = obj.get("responses")
  if not isinstance(responses, list) or len(responses) < 2:
    raise BadRecord(f"{where}: 'responses' must be a list of at least 2 strings")
  return tuple(
    parse_answer(value, f"responses[{i}]", where, may_be_empty=True)
    for i, value in enumerate(responses)
  )


def _prompt(obj: dict[str, Any], where: str) -> str | Chat:
  if isinstance(obj.get("prompt"), list):
    return _chat(messages.parse(obj["prompt"], "prompt", where), "prompt", where)
  return checked_text(_value(obj, "prompt", where), "prompt", where)


def _last_user_turn(obj: dict[str, Any], where: str) -> Chat:
  found = messages.parse(obj["messages"], "messages", where)
  while found and found[-1].role != "user":
    found.pop()
  return _chat(found, "messages", where)


def _split_dialogue(
  found: Sequence[messages.Message], name: str, where: str, may_be_empty: bool = False
) -> tuple[Chat, str]:
  """Splits messages into (prompt, answer). The answer is the last message, which must be the assistant's."""
  *before, (role, answer, _) = found
  if role != "assistant":
    raise BadRecord(f"{where}: {name!r} must end in the assistant's answer, not in role {role}")
  prompt = _chat(before, name, where)
  return prompt, checked_text(answer, f"{name}[{len(before)}].content", where, may_be_empty)


def _chat(found: Sequence[messages.Message], name: str, where: str) -> Chat:
  """Makes a prompt of messages, which must end with the user's.

  This rule is the same for every kind of record. A row therefore yields the same prompt whatever it is read as, and
  falls on the same side of the validation split.
  """
  if not found or found[-1].role != "user":
    raise BadRecord(f"{where}: {name!r} must have a message of the user right before the answer")
  checked_text(found[-1].content, f"{name}[{len(found) - 1}].content", where)
  return Chat(tuple((message.role, message.content) for message in found))


def _value(obj: dict[str, Any], key: str, where: str) -> Any:
  if key not in obj:
    raise BadRecord(f"{where}: {key!r} is missing (keys found: {listed(obj) or 'none'})")
  return obj[key]


def _decimal(number: int, key: str, where: str) -> str:
  try:
    return str(number)
  except ValueError as error:  # Python's limit on the digits of an integer
    raise BadRecord(f"{where}: {key!r} is a number of too many digits") from error
