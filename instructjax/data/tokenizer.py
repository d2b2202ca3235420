"""Converts text to token ids and back: the interface of all tokenizers, how they are loaded, and training one.

Called by the stages, by train/weights.py and by serve/. Imports its siblings bpe, controls, gguf_header,
gguf_vocabulary, sentence_pieces and special_tokens.

A prompt and its response are encoded separately, and a response needs no leading space. The following holds for every
text whose characters are in the vocabulary, including spaces and newlines:

  decode(encode(text)) == text
  decode(encode(prompt)) + decode(encode(response)) == prompt + response

Decode prompt and response separately too: decoding their ids in one call may put a space between them.

A sentencepiece model encodes each line of a text separately. A word therefore has the same ids everywhere: "The" at the
start of a line is encoded like the "The" in "all. The".
"""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from instructjax.core import foreign
from instructjax.core.errors import UserError, writing
from instructjax.core.foreign import shown
from instructjax.data import bpe, chat_files, gguf_vocabulary, special_tokens
from instructjax.data.controls import Chats, Rendered
from instructjax.data.sentence_pieces import MODEL_FILE, SentencePieceTokenizer

# A random sample of this size is enough to estimate the frequencies of pieces.
_MAX_TRAINING_CHARACTERS = 10_000_000
_NEWLINE = "\n"
# Words, numbers, blanks and bytes, which tokenizers cut in different ways.
_PROBE = "The café's 1,024 ducks\t(or 2048?) swim;\n\n  don't THEY \u6f22\u5b57 \U0001f986!"


class Tokenizer(Protocol):
  """The interface of all tokenizers.

  Attributes:
    path: the file or folder that it was loaded from.
    vocab_size: one past the largest id, which is also the size of the model's vocabulary.
    pad_id: always equal to vocab_size, so that no text and no model can produce it.
    eos_id: the token that ends a document or a response in training.
    stop_ids: the tokens at which sampling ends, `eos_id` first.
    bos_id: the token that begins every prompt; None if the model expects none.
    newline_id: the token of a newline, at which the answer of a base model is cut; None if a newline is not a token of
      its own.
    chats: what it makes of chats, with the chat template of its files.
    control_pattern: matches the text of a control token (see controls); None if there are none.
    fingerprint: SHA-256, in hex, of everything that the ids depend on.
  """

  path: pathlib.Path
  vocab_size: int
  pad_id: int
  eos_id: int
  stop_ids: tuple[int, ...]
  bos_id: int | None
  newline_id: int | None
  chats: Chats
  control_pattern: re.Pattern | None
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS.

    The text of a control token is encoded as plain text, so no text encodes to EOS.

    Raises:
      UserError: the text holds half of a surrogate pair.
    """

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt that a chat template made. Special tokens in it are recognised; BOS is put first if there is one.

    No second BOS is added if the prompt already begins with one, as chat templates write it. For any prompt, use
    `prompt_ids`.

    Raises:
      UserError: the text holds half of a surrogate pair.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Control tokens and ids outside the vocabulary (padding) decode to nothing."""

  def save(self, directory: str | os.PathLike):
    """Writes files from which `load(directory)` restores the same tokenizer, but for its clock."""


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """Ids of a prompt, begun with BOS if the model has one.

  Control tokens are recognised in what a chat template made, and nowhere else.

  Raises:
    UserError: the text holds half of a surrogate pair.
  """
  if isinstance(prompt, Rendered):
    return tokenizer.encode_prompt(prompt)
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return bos + tokenizer.encode(prompt)


def agree(ours: Tokenizer, theirs: Tokenizer) -> bool:
  """Whether ids of the first tokenizer mean the same to a model that was trained with the second.

  They may differ in what changes no id of a text: the chat template, and tokens that the second has added.
  """
  if ours.fingerprint == theirs.fingerprint:
    return True
  if theirs.vocab_size < ours.vocab_size or ours.encode(_PROBE) != theirs.encode(_PROBE):
    return False
  return all(ours.decode([i]) == theirs.decode([i]) for i in range(ours.vocab_size))


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
      names = (special_tokens.CONFIG, special_tokens.MAP, special_tokens.ADDED, chat_files.TEMPLATE)
      has_some = any(os.path.lexists(file.parent / name) for name in names)
      special = special_tokens.read_folder(file.parent) if has_some else None
      return SentencePieceTokenizer(
        file, foreign.read_bytes(file, foreign.TOKENIZER_BYTES), special
      )
  except OSError as error:
    raise UserError(f"tokenizer.path={str(path)!r} cannot be read: {error.strerror}") from error
  return _load_gguf(file)


def _file_in(folder: pathlib.Path) -> pathlib.Path:
  files = [path for path in (folder / bpe.FILE, folder / MODEL_FILE) if os.path.lexists(path)]
  if not files:
    raise UserError(
      f"{folder} has no tokenizer: it must hold one of {bpe.FILE}, {MODEL_FILE}; copy the model's"
      " there, or name it with --config.tokenizer.path when training"
    )
  # Searched as bytes, not parsed: if tokenizer.json is damaged, its reader gives the better message.
  is_copy = len(files) == 2 and re.search(
    rb'"type"\s*:\s*"Unigram"', foreign.read_bytes(files[0], foreign.TOKENIZER_BYTES)
  )
  return files[1] if is_copy else files[0]


def _load_gguf(path: pathlib.Path) -> Tokenizer:
  from instructjax.data import gguf_header  # the default preset does not need the gguf package

  metadata = gguf_header.read(path).metadata
  gguf_vocabulary.require_types(path, metadata)
  kind = metadata.get("tokenizer.ggml.model")
  if kind == "gpt2":
    return gguf_vocabulary.byte_level(path, metadata)
  if kind in ("llama", "t5"):
    special = gguf_vocabulary.special_tokens(path, metadata, adds_bos=kind == "llama")
    model = gguf_vocabulary.sentencepiece_model(path, metadata)
    return SentencePieceTokenizer(path, model, special)
  raise UserError(
    f"{path}: tokenizer.ggml.model={shown(kind)} must be 'gpt2', 'llama' or 't5'; set tokenizer.path to"
    " the model's tokenizer.json or tokenizer.model"
  )


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
