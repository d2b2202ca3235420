"""Control tokens: those that end a turn, begin one or name a role, which no text of a user may produce.

Called by tokenizer, bpe and sentence_pieces. Imports chat and special_tokens.

Files mark them badly. A token may be in the middle of a chat template and be called an ordinary one, so that a prompt
that spells it would speak in another role. Here a token is a control token by what it is used for: as EOS, BOS, pad,
unknown or another named token, as a stop token, or by the chat template; or because its file calls it special.
"""

import collections
import dataclasses
import functools
import logging
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from instructjax.core.errors import UserError
from instructjax.core.foreign import shown
from instructjax.data import chat
from instructjax.data.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool", "developer", "model", "human")
# A word of a message that is in no template and no token.
_NEUTRAL = "x"


class Rendered(str):
  """A prompt that a chat template has made, in which control tokens are meant as such.

  In every other text they are text. Methods of `str` return a plain `str`: a part of a prompt is no prompt.
  """


def looks_like_markup(text: str) -> bool:
  """Whether a token of the vocabulary is not a word: <s>, [INST], <|im_end|>, >>ANSWER<<."""
  is_bracketed = len(text) >= 3 and not (text[0].isalnum() or text[-1].isalnum())
  return is_bracketed and any(map(str.isalnum, text)) and not any(map(str.isspace, text))


def is_used(token: str, template: str | None) -> bool:
  """Whether a chat template writes a token, whole or around the name of a role as in '<|' + role + '|>'.

  Short tokens and words of small letters and digits do not count: templates are programs, which hold such words anyway.
  """
  bare = token.strip().strip("\u2581")
  if template is None or len(bare) < 3 or (bare.isalnum() and bare == bare.lower()):
    return False
  return token in template or any(
    _is_around(token, role, template) for role in _ROLES if token.count(role) == 1
  )


def _is_around(token: str, role: str, template: str) -> bool:
  """Whether a template may write what stands before and after the name of a role, which it has from a message."""
  before, after = token.split(role)
  left = not before or re.search(re.escape(before) + r"""(['"]|\s*\{\{)""", template)
  right = not after or re.search(r"""(['"]|\}\}\s*)""" + re.escape(after), template)
  return bool(before or after) and bool(left and right)


def texts(special: SpecialTokens, atomic: Iterable[str], ordinary: Iterable[str]) -> set[str]:
  """The texts of the tokens that are used as control tokens.

  Args:
    special: what the files beside the vocabulary say.
    atomic: the texts of the tokens that are recognised in a text before it is cut into pieces.
    ordinary: those of all other tokens, of which only some that are no words can be control tokens.
  """
  template = special.chat_template
  named = {text for _, text in special.named}
  found = {text for text in atomic if text in named or is_used(text, template)}
  if template is not None or named:
    found |= {
      text
      for text in ordinary
      if looks_like_markup(text) and (text in named or (template is not None and text in template))
    }
  return found


# Letters of scripts that hardly any vocabulary has: Old Persian, cuneiform, Linear B.
_RARE = "\U000103a0\U00012000\U00010000"


def require_no_unknown_end(encode: Callable[[str], list[int]], stops: tuple[int, ...], where: str):
  """Refuses a vocabulary whose token for unknown letters ends a text: any text with such a letter would end there.

  Args:
    encode: from a text to its ids.
    stops: the tokens at which sampling ends.
    where: the vocabulary, for the message.
  Raises:
    UserError: it is such a vocabulary.
  """
  ends = set(stops) & set(encode(_RARE))
  if ends:
    raise UserError(
      f"{where} encodes letters that it does not know to the token {min(ends)}, at which a text ends; name another"
      " eos_token in tokenizer_config.json"
    )


def stop_ids(
  eos_id: int,
  special: SpecialTokens,
  token: Callable[[int], tuple[str | None, bool]],
  path: str,
) -> tuple[int, ...]:
  """The ids at which sampling ends, EOS first.

  A config.json often holds the default of its architecture, which is a word in another vocabulary. So of its ids only
  those of control tokens count; settings for generation are taken at their word.

  Args:
    eos_id: the id of EOS.
    special: what the files beside the vocabulary say.
    token: makes of an id its text, None if there is none, and whether it may be a control token.
    path: the tokenizer's file, for messages.
  """
  found = [eos_id]
  for i in (*special.stops, *special.model_stops):
    text, may_be_control = token(i)
    if i in found:
      continue
    if text is None:
      logger.warning("%s: the stop token %d is not in the vocabulary and is ignored", path, i)
    elif may_be_control:
      found.append(i)
    elif i in special.stops:
      logger.warning("%s: answers also end at %s, a stop token of its settings", path, shown(text))
      found.append(i)
    else:
      logger.warning(
        "%s: config.json's eos_token_id=%d, %s, is a word and is ignored", path, i, shown(text)
      )
  return tuple(found)


def require_unicode(text: str):
  """Refuses a text with half of a surrogate pair, which stands for a byte that is no UTF-8.

  Raises:
    UserError: it has one.
  """
  if text.isascii():
    return
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"a text holds {shown(text[error.start])}, which is no character: the bytes that it was read"
      " from are not UTF-8"
    ) from error


def ordinary_pieces(
  encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]],
  text: str,
  control_ids: Collection[int],
) -> list[int]:
  """Encodes a text without control tokens: one that it spells is cut after its first letter.

  Args:
    encode: returns ids and the place of each in the text.
    text: any text.
    control_ids: ids that must not be among the result.
  Raises:
    UserError: a single letter is a control token.
  """
  ids, places = encode(text)
  cuts = {start + 1 for i, (start, _) in zip(ids, places) if i in control_ids}
  if not cuts:
    return ids
  if len(text) < 2:
    raise UserError(f"the text {shown(text)} is a control token and cannot be written otherwise")
  inside = sorted(cut for cut in cuts if cut < len(text))
  bounds = [0, *(inside or [len(text) - 1]), len(text)]
  parts = [text[start:end] for start, end in zip(bounds, bounds[1:])]
  return [i for part in parts for i in ordinary_pieces(encode, part, control_ids)]


def render(
  template: Callable[[Sequence[Mapping]], str],
  messages: Sequence[Mapping],
  spelled: Callable[[str], list[int]],
  control_texts: Mapping[int, str],
) -> Rendered:
  """Renders a chat, and makes sure that all control tokens in it are the template's own.

  Args:
    template: makes the text of messages; refuses those that hold the text of a control token.
    messages: mappings with a role and a content, both strings.
    spelled: the ids of the control tokens in a prompt, as the tokenizer recognises them.
    control_texts: the texts of all control tokens, by their ids.
  Raises:
    UserError: see chat.render; or messages spell a control token after normalization, or together.
  """
  text = template(messages)
  for number, message in enumerate(messages, start=1):
    for name in ("role", "content"):
      for i in spelled(message[name])[:1]:
        raise UserError(
          f"message {number} of a chat must not hold the special token {shown(control_texts[i])} in its"
          f" {name}, not even in other letters"
        )
  contents = [message[name] for message in messages for name in ("role", "content")]
  if any(_touches(content, frozenset(control_texts.values())) for content in contents):
    # The end of a message may be the beginning of a token, which the template or the next message completes.
    plain = [
      {**message, "content": _NEUTRAL if message["content"].strip() else message["content"]}
      for message in messages
    ]
    own = collections.Counter(spelled(template(plain)))
    for i in (collections.Counter(spelled(text)) - own).elements():
      raise UserError(
        f"the messages of a chat together spell the special token {shown(control_texts[i])}, of which each"
        " holds a part"
      )
  return Rendered(text)


@dataclasses.dataclass(frozen=True)
class Chats:
  """What a tokenizer makes of chats, with the chat template of its files.

  Attributes:
    special: the template and what it may use.
    spelled: text -> the ids of the control tokens in it, as the tokenizer recognises them in a prompt.
    control_texts: the texts of all control tokens, by their ids.
  """

  special: SpecialTokens
  spelled: Callable[[str], list[int]]
  control_texts: Mapping[int, str]

  @property
  def has_template(self) -> bool:
    """Whether chats can be rendered."""
    return self.special.chat_template is not None

  @property
  def has_clock(self) -> bool:
    """Whether the template asks for the date, so that a chat's text depends on it."""
    return chat.has_clock(self.special.chat_template)

  @property
  def clock(self) -> str | None:
    """The date and time that a run has fixed for its chats; None if there is none, or the template does not ask."""
    return self.special.clock if self.has_clock else None

  def render_one(self, messages: Sequence[Mapping]) -> Rendered:
    """The text of a chat up to the point where the assistant speaks next, as input for `tokenizer.prompt_ids`.

    Raises:
      UserError: see `render`.
    """
    return chat.only(self.render_all([messages]))

  def render_all(self, chats: Sequence[Sequence[Mapping]]) -> Iterator[Rendered | UserError]:
    """The text of each chat, or the error; much faster than one `render_one` after the other.

    Raises:
      UserError: see chat.render.
    """
    for messages, text in zip(chats, self._texts(chats)):
      if isinstance(text, UserError):
        yield text
        continue
      template = functools.partial(self._template, text, messages)
      try:
        yield render(template, messages, self.spelled, self.control_texts)
      except UserError as error:
        yield error

  def _texts(self, chats: Sequence[Sequence[Mapping]]) -> Iterator[str | UserError]:
    return chat.render(
      self.special.chat_template,
      chats,
      where=self.special.where,
      bos=self.special.bos_text,
      eos=self.special.eos_text,
      special=self.control_texts.values(),
      named=self.special.named,
      clock=self.special.clock,
    )

  def _template(self, text: str, messages: Sequence[Mapping], asked: Sequence[Mapping]) -> str:
    """The text of a chat, rendered already, or that of another one which is compared with it."""
    return text if asked is messages else chat.only(self._texts([asked]))


def _touches(text: str, control_texts: frozenset[str]) -> bool:
  """Whether a text begins with the end of a control token, or ends with the beginning of one."""
  starts, ends, longest = _halves(control_texts)
  bare = _folded(text).strip()
  return any(bare[:size] in ends or bare[-size:] in starts for size in range(1, longest))


@functools.lru_cache(maxsize=16)
def _halves(control_texts: frozenset[str]) -> tuple[set[str], set[str], int]:
  """Beginnings and ends of the tokens, and the longest token's length."""
  cuts = [(token, cut) for token in map(_folded, control_texts) for cut in range(1, len(token))]
  longest = max(map(len, map(_folded, control_texts)), default=0)
  return {t[:cut] for t, cut in cuts}, {t[cut:] for t, cut in cuts}, longest


def _folded(text: str) -> str:
  """A text as a tokenizer that normalizes may read it."""
  return unicodedata.normalize("NFKC", text).casefold()


def pattern(control_texts: Iterable[str]) -> re.Pattern | None:
  """Matches the text of a control token, the longest first; None if there are none."""
  parts = sorted(control_texts, key=lambda text: (-len(text), text))
  return re.compile("|".join(map(re.escape, parts))) if parts else None


def reads_messages(chats: Chats, asked: bool | None, name: str) -> bool:
  """Whether a model's prompts are a user's messages in its chat template, or text to go on from.

  Args:
    chats: of its tokenizer.
    asked: what --chat says; None for messages where there is a template.
    name: of the model.
  Raises:
    UserError: --chat asks for a template, and there is none.
  """
  if asked and not chats.has_template:
    raise UserError(f"--chat needs a chat template, and the tokenizer of {name} has none")
  return asked is not False and chats.has_template
