"""Exports tokenizers to other programs: files for `transformers`, metadata for llama.cpp.

Called by packaging.py only. Of the project it imports the tokenizers and the errors only.

A byte-level BPE is a format of theirs and is written as it came. Our own unigram models encode each line of a text on
its own. They are expressed as a `tokenizer.json` in which the newline piece is an added token: the parts between
newlines are then encoded apart, and each part gets the space in front that sentencepiece gives a text. Ids and decoded
texts are equal except in two cases:
  - The text spells a special token. `</s>` in a text becomes EOS, as it does in transformers for every model; in our
    tokenizer it stays plain text.
  - Two ways to cut a text have exactly the same score, as with the three letters of `ddd`. Sentencepiece adds up scores
    in less precision and may take the other way.
"""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import sentencepiece
import tokenizers
from absl import logging
from tokenizers import decoders, normalizers

from instructjax.core.errors import UserError, writing
from instructjax.data import gguf_vocabulary
from instructjax.data.sentence_pieces import SentencePieceTokenizer
from instructjax.data.tokenizer import Tokenizer

PAD_TOKEN = "<|pad|>"
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
_SPACE = "\u2581"  # sentencepiece's letter for a space
_REPLACEMENT = "\ufffd"  # the character that the unknown piece decodes to
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)  # llama.cpp's kinds of token


def write_files(
  tokenizer: Tokenizer, directory: pathlib.Path, *, max_length: int, pad_id: int | None
) -> dict[str, int | None]:
  """Writes the files that `transformers.AutoTokenizer` reads, beside those that instructjax itself reads.

  Args:
    tokenizer: tokenizer of the exported model.
    directory: folder of the export.
    max_length: the model's context, in tokens.
    pad_id: id of the token `<|pad|>` to add, one past the model's vocabulary; a classifier finds the end of a text by
      it. None for a language model, which gets no pad token.
  Returns:
    bos_token_id, eos_token_id and pad_token_id for config.json; None for a token that does not exist.
  Raises:
    UserError: the tokenizer already has a token `<|pad|>` with another id, or the files cannot be written.
  """
  with writing(directory):
    tokenizer.save(directory)
  path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
  if isinstance(tokenizer, SentencePieceTokenizer):
    built = unigram(tokenizer)
    if built is None:
      logging.warning(
        "%s cannot be expressed as a tokenizer.json: transformers gets tokenizer.model alone",
        tokenizer.path,
      )
      return _ids(tokenizer, pad_id)
  else:
    built = tokenizers.Tokenizer.from_file(str(path))
  config = _CONFIG | (json.loads(config_path.read_text("utf-8")) if config_path.exists() else {})
  config["eos_token"] = built.id_to_token(tokenizer.eos_id)
  config["model_max_length"] = max_length
  # A language model goes on at the right end of a prompt. A classifier is padded on the right, details item 12.
  config["padding_side"] = "left" if pad_id is None else "right"
  if pad_id is not None:
    built.add_special_tokens([tokenizers.AddedToken(PAD_TOKEN, special=True, normalized=False)])
    if built.token_to_id(PAD_TOKEN) != pad_id:
      raise UserError(
        f"{tokenizer.path} has a token {PAD_TOKEN} of id {built.token_to_id(PAD_TOKEN)}; the export of a"
        f" reward or value model adds one of id {pad_id}"
      )
    config["pad_token"] = PAD_TOKEN
  else:
    config.pop("pad_token", None)
  with writing(directory):
    built.save(str(path))
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
  return _ids(tokenizer, pad_id)


def _ids(tokenizer: Tokenizer, pad_id: int | None) -> dict[str, int | None]:
  return {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "pad_token_id": pad_id,
  }


def unigram(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer | None:
  """The same tokenizer for the `tokenizers` library; None if the library cannot express it.

  The unknown piece is renamed to U+FFFD, the character that it decodes to, so that `<unk>` in a text stays text.
  """
  if tokenizer.bos_id is not None:
    return None
  processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  num_pieces = processor.vocab_size()
  pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(num_pieces)]
  unknown = processor.unk_id()
  pieces[unknown] = (_REPLACEMENT, pieces[unknown][1])
  special = [i for i in range(len(pieces)) if processor.is_control(i) or i == tokenizer.eos_id]
  built = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=unknown))
  built.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
  )
  built.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.Fuse(),
      # Removes the space that was put in front of every line.
      decoders.Replace(tokenizers.Regex(r"\A |(?<=\n) "), ""),
    ]
  )
  if tokenizer.newline_id is not None:
    built.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
  built.add_special_tokens(
    [tokenizers.AddedToken(pieces[i][0], special=True, normalized=False) for i in special]
  )
  for i, token in sorted(tokenizer.added.items()):
    built.add_tokens([tokenizers.AddedToken(token.content, **token.flags)])
    if built.token_to_id(token.content) != i:
      return None
  return built if _agree(tokenizer, built, processor) else None


def _agree(tokenizer, built, processor) -> bool:
  """Whether both tokenizers give equal ids for a set of probes.

  The probes are made to differ for the kinds of model that cannot be expressed: those with merges, byte fallback or
  another normalizer.
  """
  special = (processor.unk_id(), tokenizer.eos_id)
  words = [
    processor.id_to_piece(i).replace(_SPACE, " ")
    for i in range(processor.vocab_size())
    if i not in special and not processor.is_control(i) and not processor.is_byte(i)
  ]
  spaces = [" a", "a  b", " a \n\n  b\n", " ", "\n", "\ufb01 \u2603"]  # a ligature, a rare sign
  return all(
    tokenizer.encode(text) == built.encode(text).ids
    for text in [*spaces, *words, " ".join(words), "".join(words[::-1])]
  )


def gguf_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
  """The `tokenizer.*` keys of a GGUF file.

  Raises:
    UserError: llama.cpp has no tokenizer that works like this one.
  """
  if isinstance(tokenizer, SentencePieceTokenizer):
    vocabulary = _unigram_metadata(tokenizer)
  else:
    vocabulary = _byte_level_metadata(tokenizer)
  return {
    **vocabulary,
    "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
    **_stops(tokenizer),
    "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
    "tokenizer.ggml.add_eos_token": False,
  }


def _stops(tokenizer: Tokenizer) -> dict[str, int]:
  """llama.cpp's two keys for stop tokens beside EOS: the end of a turn and of a message."""
  others = tokenizer.stop_ids[1:]
  if len(others) > 2:
    logging.warning("%s has %d stop tokens, and GGUF holds three", tokenizer.path, 1 + len(others))
  names = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
  return dict(zip(names, others))


def _unigram_metadata(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
  """The keys of a sentencepiece unigram model.

  llama.cpp calls these models 't5', after the first model that had one; 'llama' is its other kind of sentencepiece
  model, which merges. It cuts texts at the newline piece as we do. When it decodes, it drops only the first space of
  the whole text, so that later lines keep theirs.
  """
  if unigram(tokenizer) is None:
    raise UserError(
      f"{tokenizer.path} cannot be written to GGUF: of sentencepiece's models only a unigram one"
      " without normalization can"
    )
  processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
  ids = range(tokenizer.vocab_size)
  known = range(processor.vocab_size())

  def kind(i: int) -> int:
    if i not in known:
      return _CONTROL if tokenizer.added[i].special else _USER_DEFINED
    if processor.is_unknown(i):
      return _UNKNOWN
    if processor.is_control(i):
      return _CONTROL
    return _USER_DEFINED if i == tokenizer.newline_id else _NORMAL

  return {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": [
      processor.id_to_piece(i) if i in known else tokenizer.added[i].content for i in ids
    ],
    "tokenizer.ggml.scores": [float(processor.get_score(i)) if i in known else 0.0 for i in ids],
    "tokenizer.ggml.token_type": [kind(i) for i in ids],
    "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.remove_extra_whitespaces": False,
  }


def _byte_level_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
  """The keys of a byte-level BPE, read from the files that `Tokenizer.save` writes."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(pathlib.Path(folder))
    read = lambda name: json.loads((pathlib.Path(folder) / name).read_text(encoding="utf-8"))
    definition, config = read("tokenizer.json"), read("tokenizer_config.json")
  model = definition["model"]
  if model["type"] != "BPE" or definition["decoder"]["type"] != "ByteLevel":
    raise UserError(
      f"{tokenizer.path} cannot be written to GGUF: of the tokenizer.json files only those of a"
      " byte-level BPE can"
    )
  known = {i: (token, _NORMAL) for token, i in model["vocab"].items()}
  known |= {
    added["id"]: (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    for added in definition["added_tokens"]
  }
  # A vocabulary may have holes, but GGUF stores tokens as a list without any.
  tokens = [known.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(tokenizer.vocab_size)]
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": _pre_tokenizer_name(tokenizer, definition),
    "tokenizer.ggml.tokens": [token for token, _ in tokens],
    "tokenizer.ggml.token_type": [kind for _, kind in tokens],
    "tokenizer.ggml.merges": merges,
  }
  ids = {token: i for i, (token, _) in known.items()}
  if "bos_token" in config:
    metadata["tokenizer.ggml.bos_token_id"] = ids[config["bos_token"]]
  if "chat_template" in config:
    metadata["tokenizer.chat_template"] = config["chat_template"]
  return metadata


def _pre_tokenizer_name(tokenizer: Tokenizer, definition: Mapping) -> str:
  """The name in llama.cpp of the rule by which this tokenizer cuts a text into words."""

  def rule(pre_tokenizer: Any) -> Any:
    """The rule without settings that concern offsets only, so that they do not hinder the comparison."""
    if isinstance(pre_tokenizer, Mapping):
      return {k: rule(v) for k, v in pre_tokenizer.items() if k != "trim_offsets"}
    return (
      [rule(part) for part in pre_tokenizer] if isinstance(pre_tokenizer, list) else pre_tokenizer
    )

  for name in gguf_vocabulary.PRE_TOKENIZERS:
    known = tokenizers.Tokenizer(tokenizers.models.BPE())
    known.pre_tokenizer = gguf_vocabulary.pre_tokenizer(name)
    if rule(json.loads(known.to_str())["pre_tokenizer"]) == rule(definition["pre_tokenizer"]):
      return name
  logging.warning(
    "%s cuts words in a way that has no name in llama.cpp: there its 'default' is used, and ids of"
    " numbers and rare signs may differ",
    tokenizer.path,
  )
  return "default"
