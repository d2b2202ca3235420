"""Byte-level BPE, and whatever else a tokenizer.json holds that loses no text.

Called by tokenizer (`load`) and gguf_vocabulary. Imports chat and special_tokens only.

A text is encoded by two instances of one `tokenizers.Tokenizer`, since whether special tokens are
recognised is a state of the object: one for documents and responses, which cannot hold them, one
for prompts, which can.
"""

import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from instructjax.core.errors import UserError
from instructjax.data import chat, special_tokens
from instructjax.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
  import tokenizers

FILE = "tokenizer.json"
_PROBE = "A word,\n\n  another\tone\n"


class HuggingFaceTokenizer:
  """A vocabulary of the `tokenizers` package; see tokenizer.Tokenizer for what is not said here.

  Attributes:
    vocab_size: one past the largest id. Ids without a token in between are allowed: no text gives
      them, and they decode to nothing.
    newline_id: the token of a single newline. Others may hold one too, as of two newlines in a row.
    fingerprint: SHA-256 of the vocabulary and its rules, special tokens and chat template.
  """

  def __init__(self, path: pathlib.Path, tokenizer: "tokenizers.Tokenizer", special: SpecialTokens):
    """Takes the tokenizer over: its truncation and padding are switched off.

    Raises:
      UserError: there is no EOS token, a special token is not in the vocabulary, or text is lost.
    """
    self.path = path
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos_id, eos_id = (self._find(tokenizer, token) for token in (special.bos, special.eos))
    if eos_id is None:
      raise UserError(f"tokenizer.path={str(path)!r} has no end-of-sequence token")
    starts = _starts(tokenizer)
    if len(starts) > 1:
      raise UserError(
        f"tokenizer.path={str(path)!r} must begin a text with one token, has {len(starts)}"
      )
    adds_bos = special.adds_bos or bool(starts)
    bos_id = starts[0] if starts else bos_id
    if adds_bos and bos_id is None:
      raise UserError(f"{special.where} asks for a BOS token and names none")
    _mark_special(tokenizer, {eos_id} if bos_id is None else {bos_id, eos_id})
    bos = None if bos_id is None else _token(tokenizer, bos_id)
    eos = _token(tokenizer, eos_id)
    if adds_bos and not starts and bos is not None and bos_id is not None:
      _begin_with(tokenizer, bos, bos_id)
    self._special = SpecialTokens(special.where, bos, eos, adds_bos, special.chat_template)
    self._definition = tokenizer.to_str()
    self._prompts, self._texts = tokenizer, type(tokenizer).from_str(self._definition)
    self._texts.encode_special_tokens = True
    added = tokenizer.get_added_tokens_decoder().values()
    self._special_texts = tuple(token.content for token in added if token.special)
    self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    self.pad_id = self.vocab_size
    self.eos_id = eos_id
    self.bos_id = bos_id if adds_bos else None
    self.has_chat_template = special.chat_template is not None
    newline = self.encode("\n")
    self.newline_id = newline[0] if len(newline) == 1 else None
    parts = [self._definition, bos, eos, adds_bos, special.chat_template]
    self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if self.decode(self.encode(_PROBE)) != _PROBE:
      raise UserError(
        f"tokenizer.path={str(path)!r} loses capitals, spaces or newlines, which a language model"
        " must be able to write"
      )
    if eos_id in self.encode(eos):
      raise UserError(f"tokenizer.path={str(path)!r} encodes the text {eos!r} to its EOS")

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS and EOS; special tokens in it are text like any other.

    Characters that the vocabulary has no byte for are lost: SmolLM2 lacks 21 control characters.
    """
    return self._texts.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt: special tokens in it are recognised, BOS comes first where there is one."""
    ids = self._prompts.encode(text, add_special_tokens=False).ids
    if self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Special tokens and ids past the vocabulary (pads) give nothing."""
    known = [operator.index(token) for token in ids if 0 <= token < self.vocab_size]
    return self._texts.decode(known, skip_special_tokens=True)

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """Text of a chat up to where the assistant speaks next; see chat.render."""
    return chat.render(
      self._special.chat_template,
      messages,
      where=self._special.where,
      bos=self._special.bos_text,
      eos=self._special.eos_text,
      special=self._special_texts,
    )

  def save(self, directory: str | os.PathLike):
    """Writes tokenizer.json and tokenizer_config.json, which AutoTokenizer reads too."""
    directory = pathlib.Path(directory)
    special_tokens.write_folder(directory, self._special, "PreTrainedTokenizerFast")
    special_tokens.write_whole(directory / FILE, self._definition.encode())

  def _find(self, tokenizer: "tokenizers.Tokenizer", token: str | int | None) -> int | None:
    """Id of a token given by text or id."""
    if token is None:
      return None
    by_text = isinstance(token, str)
    found = tokenizer.token_to_id(token) if by_text else token
    if found is None or (not by_text and tokenizer.id_to_token(found) is None):
      raise UserError(f"tokenizer.path={str(self.path)!r} has no token {token!r}, its BOS or EOS")
    return found


def read_file(path: pathlib.Path, special: SpecialTokens) -> HuggingFaceTokenizer:
  """The tokenizer in a tokenizer.json.

  Raises:
    UserError: see HuggingFaceTokenizer; or it is no such file.
  """
  import tokenizers  # late: the default preset does without

  content = path.read_bytes()
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    added = json.loads(content)["added_tokens"]
    tokenizer.encode("a")  # a vocabulary may lack the token that it names for what is unknown
  except Exception as error:  # the package raises Exception itself
    reason = " ".join(str(error).split())
    raise UserError(f"tokenizer.path={str(path)!r} is not a tokenizer.json: {reason}") from error
  for token in added:  # the package renumbers them where one is not the next free id
    found = tokenizer.token_to_id(token["content"])
    if found != token["id"]:
      raise UserError(
        f"tokenizer.path={str(path)!r}: the added token {token['content']!r} must have the next"
        f" free id, {found}, has {token['id']}"
      )
  return HuggingFaceTokenizer(path, tokenizer, special)


def _token(tokenizer: "tokenizers.Tokenizer", token_id: int) -> str:
  """Text of a token that is known to be in the vocabulary."""
  text = tokenizer.id_to_token(token_id)
  if text is None:
    raise ValueError(f"id {token_id} has no token")
  return text


def _starts(tokenizer: "tokenizers.Tokenizer") -> list[int]:
  """Ids that the post-processor puts before a text."""
  plain, full = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
  return full[: full.index(plain[0])] if plain else []


def _mark_special(tokenizer: "tokenizers.Tokenizer", ids: set[int]):
  """Has these tokens of the vocabulary treated as special: found in prompts only, never decoded."""
  import tokenizers

  added = tokenizer.get_added_tokens_decoder()
  for i in sorted(ids):
    token = added.get(i) or tokenizers.AddedToken(tokenizer.id_to_token(i), normalized=False)
    if i not in added or not token.special:
      tokenizer.add_special_tokens([token])


def _begin_with(tokenizer: "tokenizers.Tokenizer", token: str, token_id: int):
  """Has the post-processor put a token before a text, as other readers of the file expect."""
  from tokenizers import processors

  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
  )
