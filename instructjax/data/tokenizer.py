"""Text to ids and back: the interface of all tokenizers, sentencepiece's, and training one.

Called by the stages and by `pipeline`. Imports its siblings bpe, chat, gguf_vocabulary and
special_tokens, and gguf_header.

Where texts meet. A prompt and its response are encoded each on its own, and a response needs no
space before it:

  decode(encode(text)) == text
  decode(encode(prompt)) + decode(encode(response)) == prompt + response

for any text of characters that the vocabulary has, spaces and newlines included. Ids of prompt and
response decoded in one call may have a space between them: decode them apart. A sentencepiece model
encodes each line of a text as if it stood alone, so a word has one piece wherever it stands: "The"
at the start of a line is the same id as in "all. The".
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

from instructjax.core.errors import UserError
from instructjax.data import bpe, chat, gguf_vocabulary, special_tokens
from instructjax.data.special_tokens import SpecialTokens

_MAX_TRAINING_CHARACTERS = (
  10_000_000  # a seeded choice of texts up to this much is enough for piece counts
)
_NEWLINE = "\n"
_MODEL_FILE = "tokenizer.model"


class Tokenizer(Protocol):
  """What every tokenizer is.

  Attributes:
    path: the file or folder that it was loaded from.
    vocab_size: one past the largest id, and so the model's vocabulary.
    pad_id: always vocab_size: no text and no model can produce it.
    eos_id: ends a document or a response.
    bos_id: begins every prompt; None where the model is given none.
    newline_id: the newline's token, at which a base model's answer is cut; None where a newline is
      no token of its own.
    has_chat_template: whether `render_chat` can be asked.
    fingerprint: SHA-256, in hex, of all that ids depend on.
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

    Special tokens in it are text like any other, so no text encodes to EOS.
    """

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt: special tokens in it are recognised, and BOS comes first where there is one.

    A prompt that holds BOS there already, as chat templates write it, is given no second one.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Special tokens, EOS and ids past the vocabulary (pads) give nothing."""

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """Text of a chat, for `encode_prompt`, up to where the assistant speaks; see chat.render."""

  def save(self, directory: str | os.PathLike):
    """Writes what `load(directory)` makes the same tokenizer of."""


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer at a path.

  Args:
    path: a sentencepiece `.model` file, a tokenizer.json, a folder that holds one of them (if both,
      tokenizer.json is read, unless it holds a unigram model: that is the other one's copy), or a
      `.gguf` file. What Hugging Face keeps beside the first two in tokenizer_config.json and its
      like is read with them (see special_tokens).
  Raises:
    UserError: nothing that can be read lies there, or no language model can be trained with it.
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
  # Of a damaged tokenizer.json its own reader says what is wrong.
  is_copy = len(files) == 2 and re.search(rb'"type"\s*:\s*"Unigram"', files[0].read_bytes())
  return files[1] if is_copy else files[0]


def _load_gguf(path: pathlib.Path) -> Tokenizer:
  from instructjax.data import gguf_header  # late: the default preset does without the gguf package

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
  """A sentencepiece model; see Tokenizer for what is not said here.

  A `.model` file alone has neither BOS nor special tokens in prompts: `encode_prompt` is `encode`.

  Attributes:
    model: content of the `.model` file.
    vocab_size: pieces in it.
    fingerprint: SHA-256 of the model, with special tokens and chat template where there are any.
  """

  def __init__(self, path: pathlib.Path, model: bytes, special: SpecialTokens | None):
    """Reads a model.

    Args:
      path: where it comes from.
      model: content of a `.model` file.
      special: what lies beside it; None for a file alone.
    Raises:
      UserError: it is no such file, has no EOS or a special token not at all, or loses newlines.
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
    # Other people's files, without a piece for the newline or without the space that sentencepiece
    # puts before a text, encode their text whole.
    newline_id = self._processor.piece_to_id(_NEWLINE)
    by_line = newline_id != self._processor.unk_id() and self._processor.normalize("a") == "▁a"
    self.newline_id = newline_id if by_line else None
    if self.decode(self.encode("a\nb")) != "a\nb":
      raise UserError(
        f"tokenizer.path={str(path)!r} loses newlines: it needs a piece for them, or byte fallback"
      )
    if self.eos_id in self.encode(self._processor.id_to_piece(self.eos_id)):
      raise UserError(f"tokenizer.path={str(path)!r} encodes the text of its EOS to EOS")

  def _read_special(self, special: SpecialTokens | None):
    """Sets EOS, BOS, special pieces and the fingerprint."""
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
    """Id of a piece given by text or id."""
    if token is None:
      return None
    i = self._processor.piece_to_id(token) if isinstance(token, str) else token
    if not 0 <= i < self.vocab_size or token not in (i, self._processor.id_to_piece(i)):
      raise UserError(f"tokenizer.path={str(self.path)!r} has no piece {token!r}, its BOS or EOS")
    return i

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without EOS. Characters never seen in training become the unknown id."""
    if self.newline_id is None:
      return self._processor.encode(text)
    ids = []
    for number, line in enumerate(text.split(_NEWLINE)):
      if number:
        ids.append(self.newline_id)
      ids += self._processor.encode(line)
    return ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt; what stands between its special tokens is encoded piece by piece."""
    ids = []
    if self._special_ids:
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
    """The text of ids. EOS and ids past the vocabulary (pads) give nothing."""
    lines: list[list[int]] = [[]]
    for token in ids:
      if token == self.newline_id:
        lines.append([])
      elif 0 <= token < self.vocab_size:
        lines[-1].append(operator.index(token))
    return _NEWLINE.join(self._processor.decode(line) for line in lines)

  def render_chat(self, messages: Sequence[Mapping]) -> str:
    """Text of a chat up to where the assistant speaks next; see chat.render."""
    return chat.render(
      self._special.chat_template,
      messages,
      where=self._special.where,
      bos=self._special.bos_text,
      eos=self._special.eos_text,
      special=self._special_ids,
    )

  def save(self, directory: str | os.PathLike):
    """Writes tokenizer.model, and tokenizer_config.json where something lay beside the model."""
    directory = pathlib.Path(directory)
    if self._special_ids:
      special_tokens.write_folder(directory, self._special, None)
    special_tokens.write_whole(directory / _MODEL_FILE, self.model)


def train_tokenizer(
  texts: Sequence[str], vocab_size: int, path: str | os.PathLike, seed: int
) -> SentencePieceTokenizer:
  """Trains a unigram sentencepiece model on the texts' lines and writes it to `path`.

  A function of its arguments alone: one thread, and neither time nor path enters the file. The
  pieces are <unk> (decoded as U+FFFD), </s>, the newline, every character seen, and the commonest
  words and parts of words.

  Args:
    texts: training texts; of more than 10M characters, a choice by `seed`.
    vocab_size: pieces in all.
    path: the `.model` file, replaced whole if it exists.
    seed: any non-negative integer.
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
      character_coverage=1.0,
      user_defined_symbols=[_NEWLINE],
      unk_id=0,
      eos_id=1,
      bos_id=-1,
      pad_id=-1,
      unk_surface="\ufffd",
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      # Longer lines would be skipped in silence.
      max_sentence_length=1 + max(len(line.encode()) for line in lines),
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = str(error).rsplit("] ", 1)[-1]  # what follows "INTERNAL: file(line) [condition] "
    raise UserError(
      f"cannot train a tokenizer of tokenizer.vocab_size={vocab_size} pieces: {reason}"
    ) from error
  path = pathlib.Path(path)
  special_tokens.write_whole(path, model.getvalue())
  return SentencePieceTokenizer(path, model.getvalue(), None)


def _training_lines(texts: Sequence[str], seed: int) -> list[str]:
  if sum(map(len, texts)) > _MAX_TRAINING_CHARACTERS:
    order = np.random.default_rng(seed).permutation(len(texts))
    end = np.searchsorted(np.cumsum([len(texts[i]) for i in order]), _MAX_TRAINING_CHARACTERS) + 1
    texts = [texts[i] for i in order[:end]]
  return [line for text in texts for line in text.split(_NEWLINE) if line]
