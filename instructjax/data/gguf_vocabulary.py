"""Rebuilds the tokenizer inside a GGUF file, which is byte-level BPE or a sentencepiece model.

Called by tokenizer (`load`). Imports bpe and special_tokens only.

A GGUF file holds the vocabulary but not all rules. In particular, it only names the rule that splits a text into words
before merges are applied (`tokenizer.ggml.pre`). This module holds the rules behind the known names, copied from the
models' own tokenizer.json files.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import explained, shown
from instructjax.data import bpe
from instructjax.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
  import tokenizers

# Kinds of token. GGUF uses the numbers of sentencepiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3 groups up to three digits into a word; Qwen 2 makes every digit a word.
_QWEN2 = _LLAMA3.replace("{1,3}", "")
PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")


# The names under which the metadata gives ids, and the types of the other values.
_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask")
_TYPES = {
  "tokenizer.ggml.model": str,
  "tokenizer.ggml.pre": str,
  "tokenizer.chat_template": str,
  "tokenizer.ggml.add_bos_token": bool,
  "tokenizer.ggml.add_space_prefix": bool,
  "tokenizer.ggml.remove_extra_whitespaces": bool,
  **{f"tokenizer.ggml.{name}_token_id": int for name in _IDS},
}
# Those that Hugging Face's files name, under other names.
_HF_NAMES = {"unknown": "unk", "seperator": "sep", "padding": "pad", "cls": "cls", "mask": "mask"}
_LISTS = {
  "tokens": str,
  "merges": str,
  "token_type": int,
  "scores": float | int,
  "precompiled_charsmap": int,
}


def require_types(path: pathlib.Path, metadata: Mapping):
  """Checks the types of everything that is read from the metadata, and the range of ids.

  Raises:
    UserError: a value has another type, or two tokens have one text.
  """
  for key, kind in _TYPES.items():
    value = metadata.get(key)
    # bool is a subclass of int.
    if value is not None and type(value) is not kind:
      raise UserError(f"{path}: {key} must be of type {kind.__name__}, got {shown(value)}")
    if kind is int and value is not None:
      foreign.token_id(value, f"{path}: {key}")
  for name, kind in _LISTS.items():
    values = metadata.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
      raise UserError(f"{path}: tokenizer.ggml.{name} must be a list of {_word(kind)}")
  if not all(map(math.isfinite, metadata.get("tokenizer.ggml.scores", []))):
    raise UserError(f"{path}: tokenizer.ggml.scores must be finite")
  seen: dict[str, int] = {}
  for i, token in enumerate(metadata.get("tokenizer.ggml.tokens", [])):
    if token in seen:
      raise UserError(f"{path}: token {shown(token)} has two ids, {seen[token]} and {i}")
    seen[token] = i


def _word(kind: Any) -> str:
  return "texts" if kind is str else "numbers"


def special_tokens(path: pathlib.Path, metadata: Mapping, *, adds_bos: bool) -> SpecialTokens:
  """The special tokens that the metadata names. `adds_bos` is the default if the metadata has no such flag."""
  ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _IDS}
  tokens = metadata.get("tokenizer.ggml.tokens", [])
  return SpecialTokens(
    where=path,
    bos=ids["bos"],
    eos=ids["eos"],
    adds_bos=metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
    chat_template=metadata.get("tokenizer.chat_template"),
    named=tuple(
      (f"{hf}_token", tokens[i])
      for name, hf in _HF_NAMES.items()
      if (i := ids[name]) is not None and i < len(tokens)
    ),
    stops=tuple(i for i in (ids["eot"], ids["eom"]) if i is not None),
  )


def byte_level(path: pathlib.Path, metadata: Mapping) -> bpe.HuggingFaceTokenizer:
  """Builds the byte-level BPE tokenizer that the metadata describes (`tokenizer.ggml.model` is 'gpt2').

  Raises:
    UserError: the pre-tokenizer is not known, the vocabulary is inconsistent, or HuggingFaceTokenizer refuses it.
  """
  import tokenizers
  from tokenizers import models

  pre = metadata.get("tokenizer.ggml.pre")
  if pre not in PRE_TOKENIZERS:
    raise UserError(
      f"{path}: tokenizer.ggml.pre={shown(pre)} must be one of {', '.join(PRE_TOKENIZERS)}; set"
      " tokenizer.path to the model's tokenizer.json"
    )
  tokens, kinds = _tokens(path, metadata)
  merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
  # A model's embedding table may have more rows than the tokenizer has tokens. GGUF fills the gap with unused tokens.
  vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}
  try:
    # Llama 3 takes a word that is a token as that token, even if no merges lead to it.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
  except Exception as error:  # the package raises plain Exception
    raise UserError(
      f"{path}: tokenizer.ggml.merges do not fit the tokens: {explained(error)}"
    ) from error
  with bpe.package_errors(f"{path}: the tokenizer cannot be rebuilt"):
    return _byte_level(path, metadata, tokenizers.Tokenizer(model))


def _byte_level(
  path: pathlib.Path, metadata: Mapping, tokenizer: "tokenizers.Tokenizer"
) -> bpe.HuggingFaceTokenizer:
  """Adds the rules and the added tokens to a tokenizer that has only its model."""
  import tokenizers
  from tokenizers import decoders, normalizers

  pre = metadata["tokenizer.ggml.pre"]
  tokens, kinds = _tokens(path, metadata)
  # Of these models, only Qwen 2 composes characters before encoding.
  tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
  tokenizer.pre_tokenizer = pre_tokenizer(pre)
  tokenizer.decoder = decoders.ByteLevel()
  # User-defined tokens are not special: they are recognised in documents and responses as well.
  added = [
    tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
    for token, kind in zip(tokens, kinds)
    if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
  ]
  tokenizer.add_tokens(added)
  # Llama 3 begins prompts with BOS, even if its file has no flag for it.
  special = special_tokens(path, metadata, adds_bos=pre == "llama-bpe")
  return bpe.HuggingFaceTokenizer(path, tokenizer, special)


def pre_tokenizer(name: str):
  """The rule by which one of PRE_TOKENIZERS splits a text into words."""
  from tokenizers import Regex, pre_tokenizers

  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
  if name == "gpt-2":
    return words
  first = {
    "smollm": lambda: pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": lambda: pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"),
    "qwen2": lambda: pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
  }[name]()
  return pre_tokenizers.Sequence([first, words])


def sentencepiece_model(path: pathlib.Path, metadata: Mapping) -> bytes:
  """Builds a sentencepiece `.model` file from the metadata (`tokenizer.ggml.model` is 'llama' or 't5').

  Raises:
    UserError: the vocabulary is inconsistent.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported

  tokens, kinds = _tokens(path, metadata)
  scores = metadata.get("tokenizer.ggml.scores", ())
  if len(scores) != len(tokens):
    raise UserError(f"{path}: tokenizer.ggml.scores must have {len(tokens)}, has {len(scores)}")
  model = proto.ModelProto()
  for token, kind, score in zip(tokens, kinds, scores):
    if kind == _USER_DEFINED:  # GGUF writes these with spaces, sentencepiece with ▁
      token = token.replace(" ", "▁")
    try:
      model.pieces.add(piece=token, score=score, type=kind)
    except (TypeError, ValueError) as error:
      raise UserError(
        f"{path}: token {shown(token)} of type {kind} cannot be read: {explained(error)}"
      ) from error
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  is_unigram = metadata["tokenizer.ggml.model"] == "t5"
  trainer.model_type = proto.TrainerSpec.UNIGRAM if is_unigram else proto.TrainerSpec.BPE
  trainer.vocab_size = len(tokens)
  trainer.byte_fallback = _BYTE in kinds
  for name in ("unk", "bos", "eos"):
    i = metadata.get(f"tokenizer.ggml.{'unknown' if name == 'unk' else name}_token_id")
    if i is not None and i < len(tokens):
      setattr(trainer, f"{name}_id", i)
      setattr(trainer, f"{name}_piece", tokens[i])
  trainer.unk_surface = "\ufffd"
  normalizer.precompiled_charsmap = bytes(metadata.get("tokenizer.ggml.precompiled_charsmap", ()))
  normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
  normalizer.remove_extra_whitespaces = metadata.get(
    "tokenizer.ggml.remove_extra_whitespaces", False
  )
  return model.SerializeToString()


def _tokens(path: pathlib.Path, metadata: Mapping) -> tuple[list[str], list[int]]:
  """Texts and kinds of all tokens.

  Raises:
    UserError: there are no tokens, or the number of kinds differs.
  """
  tokens = metadata.get("tokenizer.ggml.tokens", [])
  kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
  if not tokens or len(kinds) != len(tokens):
    raise UserError(
      f"{path}: tokenizer.ggml.tokens and token_type must be of one length, are"
      f" {len(tokens)} and {len(kinds)}"
    )
  return tokens, kinds
