"""Sentencepiece tokenizer: training it, loading it, text to ids and back.

Called by the stages and by `pipeline`. Imports nothing of the project.

Where texts meet. Each line of a text is encoded as if it stood alone, so a word has one piece
wherever it stands: "The" at the start of a line is the same id as in "all. The". Prompt and
response are encoded each on its own, and a response needs no space before it:

  decode(encode(text)) == text
  decode(encode(prompt)) + decode(encode(response)) == prompt + response

for any text of characters that were there in training, spaces and newlines included. Ids of prompt
and response decoded in one call have a space between them, unless the prompt ends a line: decode
them apart.
"""

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

_MAX_TRAINING_CHARACTERS = (
  10_000_000  # a seeded choice of texts up to this much is enough for piece counts
)
_NEWLINE = "\n"


class Tokenizer:
  """A sentencepiece `.model` file.

  Attributes:
    vocab_size: pieces in the file, and so the model's vocabulary.
    pad_id: always vocab_size, one past the last piece: no text and no model can produce it.
    eos_id: ends a document or a response; no text encodes to it.
    newline_id: the newline piece, at which a base model's answer is cut; None where the file has
      none.
    fingerprint: SHA-256 of the file, in hex.
  """

  def __init__(self, path: str | os.PathLike):
    try:
      model = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise ValueError(f"tokenizer.path={str(path)!r} cannot be read: {error.strerror}") from error
    try:
      self._processor = sentencepiece.SentencePieceProcessor()
      self._processor.load_from_serialized_proto(model)
    except (RuntimeError, ValueError) as error:
      raise ValueError(f"tokenizer.path={str(path)!r} is not a sentencepiece model file") from error
    self.vocab_size = self._processor.vocab_size()
    self.pad_id = self.vocab_size
    self.eos_id = self._processor.eos_id()
    self.fingerprint = hashlib.sha256(model).hexdigest()
    if self.eos_id < 0:
      raise ValueError(f"tokenizer.path={str(path)!r} has no end-of-sequence piece")
    # Other people's files, without a piece for the newline or without the space that sentencepiece
    # puts before a text, encode their text whole.
    newline_id = self._processor.piece_to_id(_NEWLINE)
    by_line = newline_id != self._processor.unk_id() and self._processor.normalize("a") == "▁a"
    self.newline_id = newline_id if by_line else None
    if self.decode(self.encode("a\nb")) != "a\nb":
      raise ValueError(
        f"tokenizer.path={str(path)!r} loses newlines: it needs a piece for them, or byte fallback"
      )

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

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. EOS and ids past the vocabulary (pads) give nothing."""
    lines: list[list[int]] = [[]]
    for token in ids:
      if token == self.newline_id:
        lines.append([])
      elif 0 <= token < self.vocab_size:
        lines[-1].append(int(token))
    return _NEWLINE.join(self._processor.decode(line) for line in lines)


def train_tokenizer(
  texts: Sequence[str], vocab_size: int, path: str | os.PathLike, seed: int
) -> Tokenizer:
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
    raise ValueError("cannot train a tokenizer: there is no text")
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
    raise ValueError(
      f"cannot train a tokenizer of tokenizer.vocab_size={vocab_size} pieces: {reason}"
    ) from error
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(model.getvalue())
  partial.replace(path)
  return Tokenizer(path)


def _training_lines(texts: Sequence[str], seed: int) -> list[str]:
  if sum(map(len, texts)) > _MAX_TRAINING_CHARACTERS:
    order = np.random.default_rng(seed).permutation(len(texts))
    end = np.searchsorted(np.cumsum([len(texts[i]) for i in order]), _MAX_TRAINING_CHARACTERS) + 1
    texts = [texts[i] for i in order[:end]]
  return [line for text in texts for line in text.split(_NEWLINE) if line]
