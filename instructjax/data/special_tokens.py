"""What lies beside a vocabulary: the tokens that begin and end a text, and the chat template.

Called by tokenizer, bpe and gguf_vocabulary. Imports nothing of the project.

Hugging Face spreads this over several files of a model's folder. The first that names the EOS token
is believed: tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json.
The first two say what ends a turn where models of one family differ (Llama 3 Instruct's <|eot_id|>:
its generation_config.json lists <|end_of_text|> before it); the last two are all that GPT-2's
folder has. BOS is read from the first two only: Qwen 2's config.json names one that it never uses.
"""

import dataclasses
import json
import os
import pathlib

from instructjax.core.errors import UserError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Special tokens as files name them.

  Attributes:
    where: the file that a chat template was looked for in; errors name it.
    bos: text or id of the token that may begin a text; None where none is named.
    eos: text or id of the token that ends a document or a turn; None where none is named.
    adds_bos: whether a flag beside the vocabulary asks for BOS.
    chat_template: jinja2 source; None where there is none.
  """

  where: pathlib.Path
  bos: str | int | None = None
  eos: str | int | None = None
  adds_bos: bool = False
  chat_template: str | None = None

  @property
  def bos_text(self) -> str | None:
    """`bos` where it is a text."""
    return self.bos if isinstance(self.bos, str) else None

  @property
  def eos_text(self) -> str | None:
    """`eos` where it is a text."""
    return self.eos if isinstance(self.eos, str) else None


def read_folder(folder: pathlib.Path) -> SpecialTokens:
  """Special tokens of a Hugging Face folder; files that are absent say nothing.

  Raises:
    UserError: a file is not JSON, or has several chat templates and none named "default".
  """
  names = (CONFIG, "special_tokens_map.json", "generation_config.json", "config.json")
  options, special, *with_ids = (_read_json(folder / name) for name in names)
  eos = [_text(file.get("eos_token")) for file in (options, special)]
  eos += [_first(file.get("eos_token_id")) for file in with_ids]
  bos = [_text(file.get("bos_token")) for file in (options, special)]
  where, template = folder / CONFIG, options.get("chat_template")
  if (folder / TEMPLATE).is_file():  # transformers 5 keeps it there, and reads it first
    where = folder / TEMPLATE
    template = _read_text(where)
  elif isinstance(template, list):
    entries = [entry for entry in template if isinstance(entry, dict)]
    named = {entry.get("name"): entry.get("template") for entry in entries}
    if "default" not in named:
      raise UserError(f"{where}: chat_template must have one named 'default', has {list(named)}")
    template = named["default"]
  if not isinstance(template, str | None):
    raise UserError(f"{where}: chat_template must be text, got {type(template).__name__}")
  return SpecialTokens(
    where=where,
    bos=_first_token(bos, "bos_token", folder),
    eos=_first_token(eos, "eos_token", folder),
    adds_bos=options.get("add_bos_token") is True,
    chat_template=template,
  )


def write_folder(folder: pathlib.Path, special: SpecialTokens, tokenizer_class: str | None):
  """Writes a tokenizer_config.json from which `read_folder` and transformers have the same.

  Args:
    folder: made if it is not there.
    special: with tokens by their text.
    tokenizer_class: transformers' class for the vocabulary; None leaves it out.
  """
  entries = {
    "tokenizer_class": tokenizer_class,
    "add_bos_token": special.adds_bos,
    "bos_token": special.bos,
    "eos_token": special.eos,
    "chat_template": special.chat_template,
    "clean_up_tokenization_spaces": False,
  }
  given = {name: value for name, value in entries.items() if value is not None}
  write_whole(folder / CONFIG, json.dumps(given, ensure_ascii=False, indent=2).encode())


def write_whole(path: pathlib.Path, content: bytes):
  """Writes a file that is never seen half written."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    content = json.loads(_read_text(path))
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} must hold a JSON object")
  return content


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from error


def _first_token(tokens: list, name: str, folder: pathlib.Path) -> str | int | None:
  """The first that a file names.

  Raises:
    UserError: it is neither a text nor an id.
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
