"""The sentencepiece tokenizer, with the tokens that files beside its model add.

Called by tokenizer (`load` and `train_tokenizer`) and by serve/tokenizer_export. Imports its siblings chat, controls,
sentencepiece_file and special_tokens.
"""

import dataclasses
import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Sequence

import sentencepiece

from instructjax.core.errors import UserError
from instructjax.core.foreign import shown
from instructjax.data import controls, sentencepiece_file, special_tokens
from instructjax.data.special_tokens import Added, SpecialTokens

MODEL_FILE = "tokenizer.model"
_NEWLINE = "\n"


class SentencePieceTokenizer:
  """A sentencepiece tokenizer. Members that are not explained here are those of Tokenizer.

  Without files beside it, a `.model` file has no BOS, and no special tokens are recognised in prompts. `encode_prompt`
  is then the same as `encode`.

  Attributes:
    model: content of the `.model` file.
    vocab_size: one past the largest id: the number of pieces, if files beside it add no tokens.
    added: the tokens that files beside the model add to its pieces, by their ids.
    fingerprint: SHA-256 of the model and, if there are files beside it, of the special tokens and the chat template.
  """

  def __init__(self, path: pathlib.Path, model: bytes, special: SpecialTokens | None):
    """Reads a model.

    Args:
      path: the file it comes from, for messages.
      model: content of a `.model` file.
      special: special tokens from the files beside it; None if there are no such files.
    Raises:
      UserError: the content is not a sentencepiece model, a special token is not in the vocabulary, an added token has
        the id of a piece, there is no EOS, or encoding loses newlines.
    """
    self.path, self.model = path, model
    self._where = f"tokenizer.path={str(path)!r}"
    kinds = sentencepiece_file.kinds(self._where, model)
    self._processor = self._texts = sentencepiece_file.processor(self._where, model)
    self._num_pieces = self._processor.vocab_size()
    self.added = self._add(special.added if special else (), special)
    self._ids_of_added = {token.content: i for i, token in self.added.items()}
    self.vocab_size = 1 + max([self._num_pieces - 1, *self.added])
    self.pad_id = self.vocab_size
    self._read_special(special)
    if self.eos_id < 0:
      raise UserError(f"{self._where} has no end-of-sequence piece")
    # Text is encoded line by line only if the model has a piece for the newline and puts a space before a text, as the
    # models of `train_tokenizer` do. Other models must encode a text as a whole, as they did when their weights were
    # trained.
    newline_id = self._processor.piece_to_id(_NEWLINE)
    by_line = newline_id != self._processor.unk_id() and self._processor.normalize("a") == "▁a"
    self.newline_id = newline_id if by_line else None
    self._read_controls(kinds)
    # Letters may be unknown to it, and decode to another character then.
    if self.decode(self.encode("a\nb")).count("\n") != 1:
      raise UserError(f"{self._where} loses newlines: it needs a piece for them, or byte fallback")
    if self.eos_id in self.encode(self._text(self.eos_id)):
      raise UserError(f"{self._where} encodes the text of its EOS to EOS")
    controls.require_no_unknown_end(self.encode, self.stop_ids, self._where)
    unknown = self._processor.unk_id()
    self._decoded([unknown] * (0 <= unknown < self._num_pieces))

  def _add(self, added: Sequence[Added], special: SpecialTokens | None) -> dict[int, Added]:
    """The tokens that files beside the model add to its pieces, by their ids.

    Raises:
      UserError: a file gives a piece another id, or gives a token the id of a piece.
    """
    found: dict[int, Added] = {}
    for token in added:
      piece = self._processor.piece_to_id(token.content)
      is_piece = self._processor.id_to_piece(piece) == token.content
      at = token.id
      if at is None and not is_piece and token.is_named and special is not None:
        # As in bpe: what has only a name is not needed. `_find` refuses a missing EOS or BOS.
        at = max([self._num_pieces, *(1 + i for i in found)])
        if token.content in (special.bos, special.eos) or at >= (special.rows or at + 1):
          continue
      if is_piece and at in (None, piece):
        continue
      if at is None:
        at = max([self._num_pieces, *(1 + i for i in found)])
      if is_piece or at < self._num_pieces or at in found:
        taken = self._processor.id_to_piece(at) if at < self._num_pieces else token.content
        raise UserError(
          f"{self._where}: the added token {shown(token.content)} has the id {at}, which is that of"
          f" {shown(taken)}; each token has one id"
          if not is_piece
          else f"{self._where}: the added token {shown(token.content)} has the ids {piece} and {at}"
        )
      found[at] = token
    return found

  def _text(self, i: int) -> str:
    """The text of a token that is in the vocabulary."""
    return self.added[i].content if i in self.added else self._processor.id_to_piece(i)

  def _is_token(self, i: int) -> bool:
    return 0 <= i < self._num_pieces or i in self.added

  def _read_special(self, special: SpecialTokens | None):
    """Sets EOS, BOS, the special pieces and the fingerprint.

    Raises:
      UserError: a special token is not in the vocabulary, or a BOS is asked for and none is named.
    """
    digest = hashlib.sha256(self.model)
    self.bos_id, self.eos_id = None, self._processor.eos_id()
    self._special_ids: dict[str, int] = {}
    self._special = SpecialTokens(self.path)
    self.stop_ids = (self.eos_id,)
    if special is not None:
      eos_id = self._find(special.eos)
      self.eos_id = self.eos_id if eos_id is None else eos_id
      bos_id = self._find(special.bos)
      if special.adds_bos and bos_id is None:
        raise UserError(f"{special.where} asks for a BOS token and names none")
      self.bos_id = bos_id if special.adds_bos else None
      self._special_ids = {
        self._processor.id_to_piece(i): i
        for i in range(self._num_pieces)
        if self._processor.is_control(i) or i in (self.eos_id, bos_id)
      } | self._ids_of_added
      bos, eos = (None if i is None or i < 0 else self._text(i) for i in (bos_id, self.eos_id))
      template = special.chat_template
      self.stop_ids = controls.stop_ids(self.eos_id, special, self._stop_text, str(self.path))
      self._special = SpecialTokens(
        special.where,
        bos,
        eos,
        special.adds_bos,
        template,
        added=tuple(dataclasses.replace(token, id=i) for i, token in self.added.items()),
        named=tuple((name, t) for name, t in special.named if self._has(t)),
        stops=self.stop_ids if len(self.stop_ids) > 1 else (),
        clock=special.clock,
      )
      digest.update(json.dumps([bos, eos, special.adds_bos, template]).encode())
      if self.added or self._special.stops:
        added = [[i, token.content, token.flags] for i, token in self.added.items()]
        digest.update(json.dumps([added, self.stop_ids]).encode())
      if template is not None and self._special.named:
        digest.update(json.dumps(self._special.named).encode())
    self.fingerprint = digest.hexdigest()

  def _stop_text(self, i: int) -> tuple[str | None, bool]:
    """A token's text, None if there is none, and whether it can be a control token."""
    if not self._is_token(i):
      return None, False
    text = self._text(i)
    is_atomic = i in self.added or self._processor.is_control(i)
    return text, is_atomic or controls.looks_like_markup(text)

  def _has(self, text: str) -> bool:
    piece = self._processor.piece_to_id(text)
    return text in self._ids_of_added or self._processor.id_to_piece(piece) == text

  def _find(self, token: str | int | None) -> int | None:
    """The id of a token that is given by its text or its id; None stays None.

    Raises:
      UserError: there is no such token.
    """
    if token is None:
      return None
    if isinstance(token, int):
      found = token if self._is_token(token) else None
    elif token in self._ids_of_added:
      found = self._ids_of_added[token]
    else:
      # piece_to_id returns the unknown id for a missing piece.
      found = self._processor.piece_to_id(token) if self._has(token) else None
    if found is None:
      raise UserError(f"{self._where} has no piece {shown(token)}, its BOS or EOS")
    return found

  def _read_controls(self, kinds: Sequence[int]):
    """Sets the control tokens, and the processor that encodes texts without them.

    Sentencepiece itself never encodes a text to a piece of the type control. Other types are replaced by 'unused' in a
    copy of the model.
    """
    pieces = {self._processor.id_to_piece(i): i for i in range(self._num_pieces)}
    defined = [text for text, i in pieces.items() if kinds[i] == sentencepiece_file.USER_DEFINED]
    atomic = [*defined, *self._ids_of_added]
    texts = controls.texts(self._special, atomic, pieces.keys() - set(defined))
    known = pieces | self._ids_of_added
    found = {known[text] for text in texts}
    found |= {i for i in range(self._num_pieces) if kinds[i] == sentencepiece_file.CONTROL}
    found |= {i for i, token in self.added.items() if token.special}
    found |= {i for i in self.stop_ids if i >= 0 and self._stop_text(i)[1]}
    if self.eos_id in defined or controls.looks_like_markup(self._text(self.eos_id)):
      found.add(self.eos_id)
    # The unknown piece stands for any rare letter, and no text is encoded to it for spelling its name.
    found.discard(self._processor.unk_id())
    self._control_texts = {i: self._text(i) for i in sorted(found)}
    self.control_pattern = controls.pattern(self._control_texts.values())
    plain = {text: i for text, i in self._ids_of_added.items() if i not in found}
    self._plain_pattern = sentencepiece_file.token_pattern(plain, self.added)
    self._prompt_pattern = sentencepiece_file.token_pattern(self._special_ids, self.added)
    spelled = lambda text: [
      i
      for i in self._encode(text, self._processor, self._prompt_pattern)
      if i in self._control_texts
    ]
    self.chats = controls.Chats(self._special, spelled, self._control_texts)
    unmarked = [i for i in found if i < self._num_pieces and kinds[i] != sentencepiece_file.CONTROL]
    if unmarked:
      # Texts are encoded differently without them.
      changed = f"{self.fingerprint} {sorted(unmarked)}"
      self.fingerprint = hashlib.sha256(changed.encode()).hexdigest()
      self._texts = sentencepiece_file.without(self._where, self.model, unmarked)

  def encode(self, text: str) -> list[int]:
    """Ids of a document or response, without BOS and EOS. Characters outside the vocabulary become the unknown id.

    Raises:
      UserError: the text holds half of a surrogate pair, or spells a control token that has no other spelling.
    """
    ids = self._encode(text, self._texts, self._plain_pattern)
    if not self._control_texts.keys().isdisjoint(ids):
      i = next(i for i in ids if i in self._control_texts)
      raise UserError(
        f"{self._where} cannot write {shown(self._control_texts[i])}, a control token, as a text"
      )
    return ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a prompt. The text between special tokens is encoded part by part.

    Raises:
      UserError: the text holds half of a surrogate pair.
    """
    ids = self._encode(text, self._processor, self._prompt_pattern)
    if self.bos_id is not None and ids[:1] != [self.bos_id]:
      ids.insert(0, self.bos_id)
    return ids

  def _encode(
    self,
    text: str,
    processor: sentencepiece.SentencePieceProcessor,
    atomic: sentencepiece_file.TokenPattern | None,
  ) -> list[int]:
    """Ids of a text, with the tokens that `atomic` matches cut out of it first."""
    controls.require_unicode(text)
    if atomic is None:
      return self._pieces(text, processor)
    ids, start = [], 0
    for begin, end, i in atomic(text):
      if begin > start:
        ids += self._pieces(text[start:begin], processor)
      ids.append(i)
      start = end
    return ids + (self._pieces(text[start:], processor) if start < len(text) else [])

  def _pieces(self, text: str, processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    if self.newline_id is None:
      return processor.encode(text)
    ids = []
    for number, line in enumerate(text.split(_NEWLINE)):
      if number:
        ids.append(self.newline_id)
      ids += processor.encode(line)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids. Control tokens and ids outside the vocabulary (padding) decode to nothing."""
    texts, pieces = [], []
    for token in map(operator.index, ids):
      is_silent = token in self._control_texts or token == self.eos_id
      if token == self.newline_id or (token in self.added and not is_silent):
        texts += [self._decoded(pieces), self._text(token)]
        pieces = []
      elif 0 <= token < self._num_pieces and not is_silent:
        pieces.append(token)
    return "".join([*texts, self._decoded(pieces)])

  def _decoded(self, pieces: list[int]) -> str:
    try:
      return self._processor.decode(pieces)
    except UnicodeDecodeError as error:  # its text for unknown letters can be any bytes
      raise UserError(
        f"{self._where} decodes tokens to what is not UTF-8: copy it again"
      ) from error

  def save(self, directory: str | os.PathLike):
    """Writes tokenizer.model, and also tokenizer_config.json if there are special tokens."""
    directory = pathlib.Path(directory)
    if self._special_ids:
      special_tokens.write_folder(directory, self._special, None)
    special_tokens.write_whole(directory / MODEL_FILE, self.model)
