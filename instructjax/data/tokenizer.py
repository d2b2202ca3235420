"""Converts text to token ids and back: the interface of all tokenizers, the sentencepiece tokenizer, and its training.

Called by the stages, by train/weights.py and by serve/. Imports its siblings bpe, chat, gguf_header, gguf_vocabulary
and special_tokens.

A prompt and its response are encoded separately, and a response needs no leading space. The following holds for every
text whose characters are in the vocabulary, including spaces and newlines:

  decode(encode(text)) == text
  decode(encode(prompt)) + decode(encode(response)) == prompt + response

Decode prompt and response separately too: decoding their ids in one call may put a space between them.

A sentencepiece model encodes each line of a text separately. A word therefore has the same ids everywhere: "The" at the
start of a line is encoded like the "The" in "all. The".
"""

import hashlib
import io
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from instructjax.core.errors import UserError, writing
from instructjax.data import bpe, chat, gguf_vocabulary, special_tokens
from instructjax.data.special_tokens import SpecialTokens

# A random sample of this size is enough to estimate the frequencies of pieces.
_MAX_TRAINING_CHARACTERS = 10_000_000
_NEWLINE = "\n"
_MODEL_FILE = "tokenizer.model"


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  Attributes:
    path: the file or folder that it was loaded from.
    vocab_size: one past the largest id, which is also the size of the model's vocabulary.
    pad_id: always equal to vocab_size, so that no text and no model can produce it.
    eos_id: the token that ends a document or a response.
    bos_id: the token that begins every prompt; None if the model expects none.
    newline_id: the token of a newline, at which the answer of a base model is cut; None if a newline is not a token of
      its own.
    has_chat_template: whether `render_chat` can be called.
    fingerprint: SHA-256, in hex, of everything that the ids depend on.
  """

  path: pathlib.Path
  vocab_size: int
  pad_id: int
  eos_id: int
  bos_id: int | None
  newline_id: int | None
  has_chat_template: bool
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS.

    The text of a special token is encoded as plain text, so no text encodes to EOS.
    """

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt. Special tokens in it are recognised, and BOS is put first if the model has one.

    No second BOS is added if the prompt already begins with one, as chat templates write it.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Special tokens, EOS and ids outside the vocabulary (padding) decode to nothing."""

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """The text of a chat up to the point where the assistant speaks next, as input for `encode_prompt`.

    Raises:
      UserError: see chat.render.
    """

  def save(self, directory: str | os.PathLike):
    """Writes files from which `load(directory)` restores the same tokenizer."""


def load(path: str | os.PathLike) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    path: a sentencepiece `.model` file, a tokenizer.json, a folder with one of them, or a `.gguf` file. If a folder has
      both, tokenizer.json is used, unless it holds a unigram model: it is then a converted copy of the `.model` file.
      The special tokens and the chat template are read from the Hugging Face files beside it (see special_tokens).
  Raises:
    UserError: there is no readable tokenizer, or it is not suitable for a language model.
  """
  path = pathlib.Path(path)
  try:
    file = _file_in(path) if path.is_dir() else path
    if file.suffix == ".json":
      return bpe.read_file(file, special_tokens.read_folder(file.parent))
    if file.suffix != ".gguf":
      has_config = (file.parent / special_tokens.CONFIG).is_file()
      special = special_tokens.read_folder(file.parent) if has_config else None
      return SentencePieceTokenizer(file, file.read_bytes(), special)
  except OSError as error:
    raise UserError(f"tokenizer.path={str(path)!r} cannot be read: {error.strerror}") from error
  return _load_gguf(file)


def _file_in(folder: pathlib.Path) -> pathlib.Path:
  files = [folder / name for name in (bpe.FILE, _MODEL_FILE) if (folder / name).is_file()]
  if not files:
    raise UserError(
      f"{folder} has no tokenizer: it must hold one of {bpe.FILE}, {_MODEL_FILE}; copy the model's"
      " there, or name it with --config.tokenizer.path when training"
    )
  # Searched as bytes, not parsed: if tokenizer.json is damaged, its reader gives the better message.
  is_copy = len(files) == 2 and re.search(rb'"type"\s*:\s*"Unigram"', files[0].read_bytes())
  return files[1] if is_copy else files[0]


def _load_gguf(path: pathlib.Path) -> Tokenizer:
  from instructjax.data import gguf_header  # the default preset does not need the gguf package

  metadata = gguf_header.read(path).metadata
  kind = metadata.get("tokenizer.ggml.model")
  if kind == "gpt2":
    return gguf_vocabulary.byte_level(path, metadata)
  if kind in ("llama", "t5"):
    special = gguf_vocabulary.special_tokens(path, metadata, adds_bos=kind == "llama")
    model = gguf_vocabulary.sentencepiece_model(path, metadata)
    return SentencePieceTokenizer(path, model, special)
  raise UserError(
    f"{path}: tokenizer.ggml.model={kind!r} must be 'gpt2', 'llama' or 't5'; set tokenizer.path to"
    " the model's tokenizer.json or tokenizer.model"
  )


class SentencePieceTokenizer:
  """A sentencepiece tokenizer. Members that are not explained here are those of Tokenizer.

  Without files beside it, a `.model` file has no BOS, and no special tokens are recognised in prompts. `encode_prompt`
  is then the same as `encode`.

  Attributes:
    model: content of the `.model` file.
    vocab_size: number of pieces.
    fingerprint: SHA-256 of the model and, if there are files beside it, of the special tokens and the chat template.
  """

  def __init__(self, path: pathlib.Path, model: bytes, special: SpecialTokens | None):
    """Reads a model.

    Args:
      path: the file it comes from, for messages.
      model: content of a `.model` file.
      special: special tokens from the files beside it; None if there are no such files.
    Raises:
      UserError: the content is not a sentencepiece model, a special token is not in the vocabulary, there is no EOS, or
        encoding loses newlines.
    """
    self.path, self.model = path, model
    try:
      self._processor = sentencepiece.SentencePieceProcessor()
      self._processor.load_from_serialized_proto(model)
    except (RuntimeError, ValueError) as error:
      raise UserError(f"tokenizer.path={str(path)!r} is not a sentencepiece model file") from error
    self.vocab_size = self._processor.vocab_size()
    self.pad_id = self.vocab_size
    self._read_special(special)
    if self.eos_id < 0:
      raise UserError(f"tokenizer.path={str(path)!r} has no end-of-sequence piece")
    # Text is encoded line by line only if the model has a piece for the newline and puts a space before a text, as the
    # models of `train_tokenizer` do. Other models must encode a text as a whole, as they did when their weights were
    # trained.
    newline_id = self._processor.piece_to_id(_NEWLINE)
    by_line = newline_id != self._processor.unk_id() and self._processor.normalize("a") == "▁a"
    self.newline_id = newline_id if by_line else None
    # Letters may be unknown to it, and decode to another character then.
    if self.decode(self.encode("a\nb")).count("\n") != 1:
      raise UserError(
        f"tokenizer.path={str(path)!r} loses newlines: it needs a piece for them, or byte fallback"
      )
    if self.eos_id in self.encode(self._processor.id_to_piece(self.eos_id)):
      raise UserError(f"tokenizer.path={str(path)!r} encodes the text of its EOS to EOS")

  def _read_special(self, special: SpecialTokens | None):
    """Sets EOS, BOS, the special pieces and the fingerprint.

    Raises:
      UserError: a special token is not in the vocabulary, or a BOS is asked for and none is named.
    """
    digest = hashlib.sha256(self.model)
    self.bos_id, self.eos_id = None, self._processor.eos_id()
    self._special_ids: dict[str, int] = {}
    self._special = SpecialTokens(self.path)
    if special is not None:
      eos_id = self._find(special.eos)
      self.eos_id = self.eos_id if eos_id is None else eos_id
      bos_id = self._find(special.bos)
      if special.adds_bos and bos_id is None:
        raise UserError(f"{special.where} asks for a BOS token and names none")
      self.bos_id = bos_id if special.adds_bos else None
      self._special_ids = {
        self._processor.id_to_piece(i): i
        for i in range(self.vocab_size)
        if self._processor.is_control(i) or i in (self.eos_id, bos_id)
      }
      bos, eos = (
        None if i is None or i < 0 else self._processor.id_to_piece(i)
        for i in (bos_id, self.eos_id)
      )
      template = special.chat_template
      self._special = SpecialTokens(special.where, bos, eos, special.adds_bos, template)
      digest.update(json.dumps([bos, eos, special.adds_bos, template]).encode())
    self.has_chat_template = self._special.chat_template is not None
    self.fingerprint = digest.hexdigest()

  def _find(self, token: str | int | None) -> int | None:
    """The id of a piece that is given by its text or its id; None stays None.

    Raises:
      UserError: the model has no such piece.
    """
    if token is None:
      return None
    i = self._processor.piece_to_id(token) if isinstance(token, str) else token
    # piece_to_id returns the unknown id for a missing piece, so the text is compared as well.
    if not 0 <= i < self.vocab_size or token not in (i, self._processor.id_to_piece(i)):
      raise UserError(f"tokenizer.path={str(self.path)!r} has no piece {token!r}, its BOS or EOS")
    return i

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS. Characters outside the vocabulary become the unknown id."""
    if self.newline_id is None:
      return self._processor.encode(text)
    ids = []
    for number, line in enumerate(text.split(_NEWLINE)):
      if number:
        ids.append(self.newline_id)
      ids += self._processor.encode(line)
    return ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt. The text between special tokens is encoded part by part."""
    ids = []
    if self._special_ids:
      # Longest first: a special token may begin with the text of another.
      special = "|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True)))
      for part in re.split(f"({special})", text):
        if part in self._special_ids:
          ids.append(self._special_ids[part])
        elif part:
          ids += self.encode(part)
    else:
      ids = self.encode(text)
    if self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. EOS and ids outside the vocabulary (padding) decode to nothing."""
    lines: list[list[int]] = [[]]
    for token in ids:
      if token == self.newline_id:
        lines.append([])
      elif 0 <= token < self.vocab_size:
        lines[-1].append(operator.index(token))
    return _NEWLINE.join(self._processor.decode(line) for line in lines)

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """The text of a chat, up to the point where the assistant speaks next.

    Raises:
      UserError: see chat.render.
    """
    return chat.render(
      self._special.chat_template,
      messages,
      where=self._special.where,
      bos=self._special.bos_text,
      eos=self._special.eos_text,
      special=self._special_ids,
    )

  def save(self, directory: str | os.PathLike):
    """Writes tokenizer.model, and also tokenizer_config.json if there are special tokens."""
    directory = pathlib.Path(directory)
    if self._special_ids:
      special_tokens.write_folder(directory, self._special, None)
    special_tokens.write_whole(directory / _MODEL_FILE, self.model)


def train_tokenizer(
  texts: Sequence[str], vocab_size: int, path: str | os.PathLike, seed: int
) -> SentencePieceTokenizer:
  """Trains a unigram sentencepiece model on the lines of texts and writes it to `path`.

  The result depends on the arguments only: training uses one thread, and the file contains neither the time nor the
  path. Its pieces are <unk> (decoded as U+FFFD), </s>, the newline, every character of the texts, and the most frequent
  words and parts of words.

  Args:
    texts: training texts. If they have more than 10M characters, a random sample of them is used.
    vocab_size: total number of pieces.
    path: the `.model` file; an existing file is replaced atomically.
    seed: any non-negative integer; chooses the sample.
  Raises:
    UserError: there is no text, or a vocabulary of this size cannot be made from it.
  """
  lines = _training_lines(texts, seed)
  if not lines:
    raise UserError("cannot train a tokenizer: there is no text")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type="unigram",
      vocab_size=vocab_size,
      # Every character gets a piece and text is not normalised, so that decode(encode(text)) == text.
      character_coverage=1.0,
      user_defined_symbols=[_NEWLINE],
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      unk_surface="\ufffd",
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      # sentencepiece silently skips longer lines, and takes no limit below 10.
      max_sentence_length=max(10, 1 + max(len(line.encode()) for line in lines)),
      num_threads=1,  # keeps the result deterministic
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rsplit("] ", 1)[-1]  # the part after "INTERNAL: file(line) [condition] "
    raise UserError(
      f"cannot train a tokenizer of tokenizer.vocab_size={vocab_size} pieces: {reason}"
    ) from error
  path = pathlib.Path(path)
  with writing(path):
    special_tokens.write_whole(path, model.getvalue())
  return SentencePieceTokenizer(path, model.getvalue(), None)


def _training_lines(texts: Sequence[str], seed: int) -> list[str]:
  if sum(map(len, texts)) > _MAX_TRAINING_CHARACTERS:
    order = np.random.default_rng(seed).permutation(len(texts))
    # Whole texts, up to and including the one that reaches the limit.
    end = np.searchsorted(np.cumsum([len(texts[i]) for i in order]), _MAX_TRAINING_CHARACTERS) + 1
    texts = [texts[i] for i in order[:end]]
  return [line for text in texts for line in text.split(_NEWLINE) if line]
