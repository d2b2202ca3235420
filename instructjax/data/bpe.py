"""Tokenizers from a tokenizer.json file: byte-level BPE, and any other kind that reproduces all text.

Called by tokenizer (`load`) and gguf_vocabulary. Imports chat and special_tokens only.

Each tokenizer keeps two instances of the same `tokenizers.Tokenizer`, because the object itself holds the switch that
decides whether special tokens are recognised. Prompts may contain special tokens, so their instance recognises them.
Documents and responses may not, so their instance encodes the text of a special token like any other text.
"""

import dataclasses
import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from instructjax.core.errors import UserError, one_line
from instructjax.data import chat, special_tokens
from instructjax.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
  import tokenizers

FILE = "tokenizer.json"
# A language model must be able to write capitals, tabs, several spaces and blank lines. Tokenizers that normalise text
# lose some of them.
_PROBE = "A word,\n\n  another\tone\n"


class HuggingFaceTokenizer:
  """A tokenizer of the `tokenizers` package. Members that are not explained here are those of tokenizer.Tokenizer.

  Attributes:
    vocab_size: one past the largest id. There may be ids without a token: no text encodes to them, and they decode to
      nothing.
    newline_id: the token of a single newline. Other tokens may contain newlines too, such as one of two newlines.
    fingerprint: SHA-256 of the vocabulary, its rules, the special tokens and the chat template.
  """

  def __init__(self, path: pathlib.Path, tokenizer: "tokenizers.Tokenizer", special: SpecialTokens):
    """Takes ownership of the tokenizer, and switches its truncation and padding off.

    Args:
      path: the file that it was read from, for messages.
      tokenizer: changed in place.
      special: the special tokens that the files beside the vocabulary name.
    Raises:
      UserError: there is no EOS token, a special token is not in the vocabulary, or encoding loses text.
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
    # The tokenizer's own post-processor takes precedence over the files beside it: it is what other programs run.
    adds_bos = special.adds_bos or bool(starts)
    bos_id = starts[0] if starts else bos_id
    if adds_bos and bos_id is None:
      raise UserError(f"{special.where} asks for a BOS token and names none")
    _mark_special(tokenizer, {eos_id} if bos_id is None else {bos_id, eos_id})
    bos = None if bos_id is None else _token(tokenizer, bos_id)
    eos = _token(tokenizer, eos_id)
    if adds_bos and not starts and bos is not None and bos_id is not None:
      _begin_with(tokenizer, bos, bos_id)
    self._special = dataclasses.replace(special, bos=bos, eos=eos, adds_bos=adds_bos)
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
    parts = [self._definition, bos, eos, adds_bos, special.chat_template, special.named]
    self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if self.decode(self.encode(_PROBE)) != _PROBE:
      raise UserError(
        f"tokenizer.path={str(path)!r} loses capitals, spaces or newlines, which a language model"
        " must be able to write"
      )
    # Otherwise a document or a response could end itself by spelling out EOS.
    if eos_id in self.encode(eos):
      raise UserError(f"tokenizer.path={str(path)!r} encodes the text {eos!r} to its EOS")

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS. The text of a special token is encoded as plain text.

    Characters whose bytes are not in the vocabulary are lost. SmolLM2, for example, lacks 21 control characters.
    """
    return self._texts.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt. Special tokens in it are recognised, and BOS is put first if the model has one."""
    ids = self._prompts.encode(text, add_special_tokens=False).ids
    # A chat template usually writes BOS itself.
    if self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Special tokens and ids outside the vocabulary (padding) decode to nothing."""
    known = [operator.index(token) for token in ids if 0 <= token < self.vocab_size]
    return self._texts.decode(known, skip_special_tokens=True)

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """The text of a chat, up to the point where the assistant speaks next.

    Raises:
      UserError: see chat.render.
    """
    return chat.only(self.render_chats([messages]))

  def render_chats(self, chats: Sequence[Sequence[Mapping]]) -> Iterator[str | UserError]:
    """The text of each chat, or the error; see chat.render."""
    return chat.render(
      self._special.chat_template,
      chats,
      where=self._special.where,
      bos=self._special.bos_text,
      eos=self._special.eos_text,
      special=self._special_texts,
      named=self._special.named,
      clock=self._special.clock,
    )

  @property
  def has_clock(self) -> bool:
    """Whether the chat template asks for the date."""
    return chat.has_clock(self._special.chat_template)

  @property
  def clock(self) -> str | None:
    """The date and time that a run has fixed for its chats; None if there is none, or the template does not ask."""
    return self._special.clock if self.has_clock else None

  def save(self, directory: str | os.PathLike):
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer can read as well."""
    directory = pathlib.Path(directory)
    special_tokens.write_folder(directory, self._special, "PreTrainedTokenizerFast")
    special_tokens.write_whole(directory / FILE, self._definition.encode())

  def _find(self, tokenizer: "tokenizers.Tokenizer", token: str | int | None) -> int | None:
    """The id of a token that is given by its text or its id; None stays None.

    Raises:
      UserError: the vocabulary has no such token.
    """
    if token is None:
      return None
    by_text = isinstance(token, str)
    found = tokenizer.token_to_id(token) if by_text else token
    if found is None or (not by_text and tokenizer.id_to_token(found) is None):
      raise UserError(f"tokenizer.path={str(self.path)!r} has no token {token!r}, its BOS or EOS")
    return found


def read_file(path: pathlib.Path, special: SpecialTokens) -> HuggingFaceTokenizer:
  """Reads a tokenizer.json.

  Raises:
    UserError: the file is not a tokenizer.json, or HuggingFaceTokenizer refuses its content.
  """
  import tokenizers  # imported here because the default preset does not need it

  content = path.read_bytes()
  try:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    added = json.loads(content)["added_tokens"]
    # Fails if the vocabulary lacks the token that it names as the unknown token.
    tokenizer.encode("a")
  except Exception as error:  # the package raises plain Exception
    raise UserError(
      f"tokenizer.path={str(path)!r} is not a tokenizer.json: {one_line(error)}"
    ) from error
  # The package silently renumbers an added token whose id is not the next free one. The model's weights would then not
  # fit the ids.
  for token in added:
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
  """The ids that the post-processor puts before a text."""
  plain, full = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
  return full[: full.index(plain[0])] if plain else []


def _mark_special(tokenizer: "tokenizers.Tokenizer", ids: set[int]):
  """Marks tokens of the vocabulary as special, so that they are recognised in prompts only and never decoded."""
  import tokenizers

  added = tokenizer.get_added_tokens_decoder()
  for i in sorted(ids):
    token = added.get(i) or tokenizers.AddedToken(tokenizer.id_to_token(i), normalized=False)
    if i not in added or not token.special:
      tokenizer.add_special_tokens([token])


def _begin_with(tokenizer: "tokenizers.Tokenizer", token: str, token_id: int):
  """Makes the post-processor put a token before each text.

  This class adds BOS itself and does not use it. It serves other programs that read a saved file.
  """
  from tokenizers import processors

  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
  )
