"""Tokenizers from a tokenizer.json file: byte-level BPE, and any other kind that reproduces all text.

Called by tokenizer (`load`) and gguf_vocabulary. Imports chat, controls, special_tokens and vocabulary_file only.

Each tokenizer keeps two instances of the same `tokenizers.Tokenizer`, because the object itself holds the switch that
decides whether special tokens are recognised. Prompts may contain special tokens, so their instance recognises them.
Documents and responses may not, so their instance encodes the text of a special token like any other text. There, all
control tokens are special, whatever the file says.
"""

import contextlib
import hashlib
import json
import logging
import operator
import os
import pathlib
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

from instructjax.core.errors import UserError
from instructjax.core.foreign import explained, shown
from instructjax.data import controls, special_tokens, vocabulary_file
from instructjax.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
  import tokenizers

logger = logging.getLogger(__name__)

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
      UserError: there is no EOS token, a special token is not in the vocabulary, an added token has another id than the
        next free one, or encoding loses text.
    """
    self.path = path
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add(tokenizer, special, path)
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
    self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    self.pad_id = self.vocab_size
    self.eos_id = eos_id
    self.bos_id = bos_id if adds_bos else None
    self.stop_ids = controls.stop_ids(eos_id, special, self._stop_text(tokenizer), str(path))
    added = tokenizer.get_added_tokens_decoder()
    ends = {eos_id, *(i for i in self.stop_ids if i in added)}
    _mark_special(tokenizer, ends if bos_id is None else {bos_id, *ends})
    bos = None if bos_id is None else _token(tokenizer, bos_id)
    eos = _token(tokenizer, eos_id)
    if adds_bos and not starts and bos is not None and bos_id is not None:
      _begin_with(tokenizer, bos, bos_id)
    self._special = SpecialTokens(
      special.where,
      bos,
      eos,
      adds_bos,
      special.chat_template,
      named=tuple((name, t) for name, t in special.named if tokenizer.token_to_id(t) is not None),
      stops=self.stop_ids if len(self.stop_ids) > 1 else (),
      clock=special.clock,
    )
    self._definition = tokenizer.to_str()
    self._prompts = tokenizer
    self._read_controls()
    controls.require_no_unknown_end(self.encode, self.stop_ids, f"tokenizer.path={str(path)!r}")
    newline = self.encode("\n")
    self.newline_id = newline[0] if len(newline) == 1 else None
    parts = [self._definition, bos, eos, adds_bos, special.chat_template]
    parts += [self._special.stops] if self._special.stops else []
    parts += [self._special.named] if self.chats.has_template else []
    self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if self.decode(self.encode(_PROBE)) != _PROBE:
      raise UserError(
        f"tokenizer.path={str(path)!r} loses capitals, spaces or newlines, which a language model"
        " must be able to write"
      )

  def _read_controls(self):
    """Sets the control tokens, and the instance that encodes texts without them.

    Raises:
      UserError: EOS is a word.
    """
    definition = json.loads(self._definition)
    added = {token["id"]: token for token in definition["added_tokens"]}
    vocab = self._prompts.get_vocab(with_added_tokens=True)
    atomic = [token["content"] for token in added.values()]
    texts = controls.texts(self._special, atomic, vocab.keys() - set(atomic))
    found = {vocab[text] for text in texts} | {i for i in added if added[i]["special"]}
    found |= {self.eos_id, *(i for i in self.stop_ids if i in added)}
    for i in found & added.keys():
      added[i]["special"] = True
    self._texts = type(self._prompts).from_str(json.dumps(definition))
    self._texts.encode_special_tokens = True
    self._control_ids = frozenset()
    self._control_texts = {i: _token(self._prompts, i) for i in sorted(found)}
    for i, text in list(self._control_texts.items()):
      if i not in self._texts.encode(text, add_special_tokens=False).ids:
        continue
      # Otherwise a document or a response could end itself by spelling out EOS.
      if i == self.eos_id and not controls.looks_like_markup(text):
        raise UserError(
          f"tokenizer.path={str(self.path)!r} encodes the text {shown(text)} to its EOS"
        )
      if len(text) == 1:  # a letter that also serves as the pad token or the like
        del self._control_texts[i]
    # The unknown token stands for any rare letter, and no text is encoded to it for spelling its name.
    model = definition["model"]
    unknown = {vocab.get(model.get("unk_token")), model.get("unk_id")}
    self._control_ids = frozenset(self._control_texts.keys() - unknown)
    self.control_pattern = controls.pattern(self._control_texts.values())
    spelled = lambda text: [
      i for i in self._encoding(self._prompts, text).ids if i in self._control_ids
    ]
    self.chats = controls.Chats(self._special, spelled, self._control_texts)

  def _stop_text(self, tokenizer: "tokenizers.Tokenizer"):
    """Makes the function from an id to (its token, whether it can be a control token)."""
    added = tokenizer.get_added_tokens_decoder()

    def text_of(i: int) -> tuple[str | None, bool]:
      token = tokenizer.id_to_token(i)
      return token, token is not None and (i in added or controls.looks_like_markup(token))

    return text_of

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS. The text of a special token is encoded as plain text.

    Characters whose bytes are not in the vocabulary are lost. SmolLM2, for example, lacks 21 control characters.

    Raises:
      UserError: the text holds half of a surrogate pair, or the package fails at it.
    """
    ids = self._encoding(self._texts, text).ids
    if self._control_ids.isdisjoint(ids):
      return ids

    def encode(part: str):
      encoding = self._encoding(self._texts, part)
      return encoding.ids, encoding.offsets

    return controls.ordinary_pieces(encode, text, self._control_ids)

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt. Special tokens in it are recognised, and BOS is put first if the model has one.

    Raises:
      UserError: see `encode`.
    """
    ids = self._encoding(self._prompts, text).ids
    # A chat template usually writes BOS itself.
    if self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def _encoding(self, tokenizer: "tokenizers.Tokenizer", text: str) -> "tokenizers.Encoding":
    controls.require_unicode(text)
    with package_errors(f"tokenizer.path={str(self.path)!r} cannot encode {shown(text)}"):
      return tokenizer.encode(text, add_special_tokens=False)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Control tokens and ids outside the vocabulary (padding) decode to nothing."""
    known = [operator.index(token) for token in ids if 0 <= token < self.vocab_size]
    with package_errors(f"tokenizer.path={str(self.path)!r} cannot decode ids"):
      return self._texts.decode(known, skip_special_tokens=True)

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
      raise UserError(
        f"tokenizer.path={str(self.path)!r} has no token {shown(token)}, its BOS or EOS"
      )
    return found


def read_file(path: pathlib.Path, special: SpecialTokens) -> HuggingFaceTokenizer:
  """Reads a tokenizer.json.

  Raises:
    UserError: the file is not a tokenizer.json, or HuggingFaceTokenizer refuses its content.
  """
  import tokenizers  # imported here because the default preset does not need it

  text, content = vocabulary_file.read(path)
  with package_errors(f"tokenizer.path={str(path)!r} is not a tokenizer.json"):
    tokenizer = tokenizers.Tokenizer.from_str(text)
    # Fails if the vocabulary lacks the token that it names as the unknown token.
    tokenizer.encode("a")
    for token in content["added_tokens"]:
      _require_id(tokenizer, token["content"], token["id"], path)
    return HuggingFaceTokenizer(path, tokenizer, special)


@contextlib.contextmanager
def package_errors(failure: str) -> Generator[None, None, None]:
  """Turns what the `tokenizers` package raises into a UserError that begins with `failure`.

  It raises plain Exception, and where its Rust code panics an exception that is no Exception.
  """
  try:
    yield
  except BaseException as error:
    if type(error) is not Exception and type(error).__name__ != "PanicException":
      raise
    raise UserError(f"{failure}: {explained(error)}") from error


def _add(tokenizer: "tokenizers.Tokenizer", special: SpecialTokens, path: pathlib.Path):
  """Adds the tokens that files beside the vocabulary name, as transformers does.

  Raises:
    UserError: an added token gets another id than its file says.
  """
  import tokenizers

  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  for token in special.added:
    exists = tokenizer.token_to_id(token.content) is not None
    if token.is_named:
      is_end = token.content in (special.bos, special.eos)
      if is_end and not exists:  # `_find` refuses it, if it is needed
        continue
      if exists and not is_end and not controls.looks_like_markup(token.content):
        continue  # a word that also serves as the pad token; to mark it would cut the words around it
      new_id = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
      if not exists and special.rows is not None and new_id >= special.rows:
        logger.warning(
          "%s: %s is not used: the model has no row for it", path, shown(token.content)
        )
        continue
    if token.content not in known or token.replaces:
      tokenizer.add_tokens([tokenizers.AddedToken(token.content, **token.flags)])
    if token.id is not None:
      _require_id(tokenizer, token.content, token.id, path)


def _require_id(tokenizer: "tokenizers.Tokenizer", token: str, token_id: int, path: pathlib.Path):
  """Refuses an added token whose id is not the next free one.

  The package silently renumbers it. The model's weights would then not fit the ids.
  """
  found = tokenizer.token_to_id(token)
  if found != token_id:
    raise UserError(
      f"tokenizer.path={str(path)!r}: the added token {shown(token)} must have the next free id,"
      f" {found}, has {token_id}"
    )


def _token(tokenizer: "tokenizers.Tokenizer", token_id: int) -> str:
  """The text of a token."""
  text = tokenizer.id_to_token(token_id)
  if text is None:
    raise UserError(f"the tokenizer has no token of id {token_id}")
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
