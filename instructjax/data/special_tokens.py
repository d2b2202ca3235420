"""Reads and writes the files beside a vocabulary: the tokens that begin and end a text, and the chat template.

Called by tokenizer, bpe and gguf_vocabulary. Imports chat_files only.

Hugging Face spreads this information over several files in a model's folder. The EOS token is taken from the first file
that names it, in the order tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json. The
first two name the token that ends a turn, even where models of a family differ: Llama 3 Instruct ends turns with
<|eot_id|>, but its generation_config.json lists <|end_of_text|> first. The last two are needed because GPT-2's folder
has no others. BOS is read from the first two only, because Qwen 2's config.json names a BOS that the model never uses.
"""

import dataclasses
import json
import os
import pathlib

from instructjax.core.errors import UserError
from instructjax.data import chat_files

CONFIG = "tokenizer_config.json"
# Tokens beside BOS and EOS to which transformers gives a name that templates may use.
_NAMED = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """The special tokens that files name.

  Attributes:
    where: the file in which a chat template was looked for, for messages.
    bos: text or id of the token that may begin a text; None if no file names one.
    eos: text or id of the token that ends a document or a turn; None if no file names one.
    adds_bos: whether a flag beside the vocabulary says that prompts begin with BOS.
    chat_template: jinja2 source; None if there is none.
    named: names and texts of other tokens that a template may use, as ("pad_token", "<pad>").
    clock: the date and time that the template sees, see chat.render; None if the files fix none.
  """

  where: pathlib.Path
  bos: str | int | None = None
  eos: str | int | None = None
  adds_bos: bool = False
  chat_template: str | None = None
  named: tuple[tuple[str, str], ...] = ()
  clock: str | None = None

  @property
  def bos_text(self) -> str | None:
    """`bos` where it is a text."""
    return self.bos if isinstance(self.bos, str) else None

  @property
  def eos_text(self) -> str | None:
    """`eos` where it is a text."""
    return self.eos if isinstance(self.eos, str) else None


def read_folder(folder: pathlib.Path) -> SpecialTokens:
  """Reads the special tokens of a Hugging Face folder. Missing files are skipped.

  Raises:
    UserError: a file is not JSON, an entry has the wrong type, or see chat_files.find.
  """
  names = (CONFIG, "special_tokens_map.json", "generation_config.json", "config.json")
  options, special, *with_ids = (_read_json(folder / name) for name in names)
  eos = [_text(file.get("eos_token")) for file in (options, special)]
  eos += [_first(file.get("eos_token_id")) for file in with_ids]
  bos = [_text(file.get("bos_token")) for file in (options, special)]
  where, template = chat_files.find(folder, folder / CONFIG, options.get("chat_template"))
  named = {}
  for name in _NAMED:
    texts = [_text(file.get(name)) for file in (options, special)]
    if isinstance(text := next((text for text in texts if text is not None), None), str):
      named[name] = text
  return SpecialTokens(
    where=where,
    bos=_first_token(bos, "bos_token", folder),
    eos=_first_token(eos, "eos_token", folder),
    adds_bos=options.get("add_bos_token") is True,
    chat_template=template,
    named=tuple(named.items()),
    clock=chat_files.read_clock(folder),
  )


def write_folder(folder: pathlib.Path, special: SpecialTokens, tokenizer_class: str | None):
  """Writes a tokenizer_config.json that `read_folder` and transformers understand alike.

  Args:
    folder: created if it does not exist.
    special: its tokens must be given as text.
    tokenizer_class: name of transformers' class for the vocabulary; None leaves the entry out.
  """
  entries = {
    "tokenizer_class": tokenizer_class,
    "add_bos_token": special.adds_bos,
    "bos_token": special.bos,
    "eos_token": special.eos,
    **dict(special.named),
    "chat_template": special.chat_template,
    "clean_up_tokenization_spaces": False,
  }
  given = {name: value for name, value in entries.items() if value is not None}
  write_whole(folder / CONFIG, json.dumps(given, ensure_ascii=False, indent=2).encode())


def write_whole(path: pathlib.Path, content: bytes):
  """Writes a file atomically, so that no other process ever reads an incomplete file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    content = json.loads(chat_files.read_text(path))
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} must hold a JSON object")
  return content


def _first_token(tokens: list, name: str, folder: pathlib.Path) -> str | int | None:
  """The first of these tokens that is not None, or None.

  Raises:
    UserError: it is neither a text nor a valid id.
  """
  token = next((token for token in tokens if token is not None), None)
  is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
  if not (is_id or isinstance(token, str | None)):
    raise UserError(f"{folder}: {name} must be a text or an id, got {token!r}")
  return token


def _text(token) -> str | None:
  return token.get("content") if isinstance(token, dict) else token


def _first(token_id) -> int | None:
  return next(iter(token_id), None) if isinstance(token_id, list) else token_id
