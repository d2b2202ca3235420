"""Reads and writes the files beside a vocabulary: added tokens, those that begin and end a text, the chat template.

Called by tokenizer, bpe and gguf_vocabulary. Imports chat_files.

Hugging Face spreads this information over several files in a model's folder. The EOS token is taken from the first file
that names it, in the order tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json. The
first two name the token that ends a turn, even where models of a family differ: Llama 3 Instruct ends turns with
<|eot_id|>, but its generation_config.json lists <|end_of_text|> first. The last two are needed because GPT-2's folder
has no others. BOS is read from the first two only, because Qwen 2's config.json names a BOS that the model never uses.

Training appends this one EOS. Sampling ends at every token of generation_config.json's list, as in transformers, and at
config.json's where there is no such list.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import shown
from instructjax.data import chat_files

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"

# The tokens that transformers knows by a name, in its order, in which it also adds those that are new.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Added:
  """A token that files beside the vocabulary add to it, with the fields of tokenizers.AddedToken.

  Attributes:
    content: its text.
    id: None if the files name none; it is then the next free one.
    is_named: whether it is there only because it is called the pad token or the like. Nothing needs it if the model has
      no row for it.
  """

  content: str
  id: int | None = None
  single_word: bool = False
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = False
  special: bool = True
  is_named: bool = False
  replaces: bool = False

  @property
  def flags(self) -> dict[str, bool]:
    """The switches of tokenizers.AddedToken."""
    return {name: getattr(self, name) for name in _FLAGS}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """The special tokens that files name.

  Attributes:
    where: the file in which a chat template was looked for, for messages.
    bos: text or id of the token that may begin a text; None if no file names one.
    eos: text or id of the token that ends a document or a turn; None if no file names one.
    adds_bos: whether a flag beside the vocabulary says that prompts begin with BOS.
    chat_template: jinja2 source; None if there is none.
    added: the tokens that the files add, in the order in which transformers adds them.
    named: names and texts of other tokens that play a part, as ("pad_token", "<pad>").
    stops: ids at which sampling ends, from settings for generation.
    model_stops: the same from the model's own config, whose defaults may be meant for another vocabulary.
    rows: rows of the model's embedding table; None if no file says.
    clock: the date and time that the template sees, see chat.render; None if the files fix none.
  """

  where: pathlib.Path
  bos: str | int | None = None
  eos: str | int | None = None
  adds_bos: bool = False
  chat_template: str | None = None
  added: tuple[Added, ...] = ()
  named: tuple[tuple[str, str], ...] = ()
  stops: tuple[int, ...] = ()
  model_stops: tuple[int, ...] = ()
  rows: int | None = None
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
  names = (CONFIG, MAP, GENERATION, "config.json")
  options, special, *with_ids = (_read_json(folder / name) for name in names)
  of_map, of_options = _texts(special, folder / MAP), _texts(options, folder / CONFIG)
  texts = of_map | of_options
  eos_lists = [
    _ids(file.get("eos_token_id"), f"{folder / name}: eos_token_id")
    for name, file in zip(names[2:], with_ids)
  ]
  eos = [texts.get("eos_token"), *(ids[0] for ids in eos_lists if ids)]
  where, template = chat_files.find(folder, folder / CONFIG, options.get("chat_template"))
  content = lambda token: token.content if isinstance(token, Added) else token
  rows = with_ids[1].get("vocab_size")
  return SpecialTokens(
    where=where,
    bos=content(texts.get("bos_token")),
    eos=content(next((token for token in eos if token is not None), None)),
    adds_bos=foreign.flag(options.get("add_bos_token"), f"{folder / CONFIG}: add_bos_token"),
    chat_template=template,
    added=_added_tokens(folder, (options, of_options), (special, of_map)),
    named=tuple(
      (name, token.content)
      for name, token in texts.items()
      if isinstance(token, Added) and name not in ("bos_token", "eos_token")
    ),
    stops=eos_lists[0],
    model_stops=() if eos_lists[0] else eos_lists[1],
    rows=rows if type(rows) is int and rows > 0 else None,
    clock=chat_files.read_clock(folder),
  )


def _texts(content: Mapping, path: pathlib.Path) -> dict[str, Added | int]:
  """The tokens that a file names, by their names: first those of _NAMES, in this order."""
  others = [key for key in content if key.endswith("_token") and key not in _NAMES]
  found = {}
  for key in (*_NAMES, *others):
    token = content.get(key)
    # Flags such as add_bos_token end in "_token" too.
    if token is not None and (key in _NAMES or isinstance(token, str | dict)):
      found[key] = _named(token, f"{path}: {key}")
  return found


def _added_tokens(
  folder: pathlib.Path,
  config: tuple[Mapping, Mapping],
  special_map: tuple[Mapping, Mapping],
) -> tuple[Added, ...]:
  """The tokens that the files add to the vocabulary, in transformers' order.

  As in transformers, `added_tokens_decoder` of tokenizer_config.json replaces special_tokens_map.json and
  added_tokens.json.

  Args:
    folder: of the files.
    config, special_map: content of tokenizer_config.json and of special_tokens_map.json, each with the tokens that it
      names.
  """
  (options, named), (special, of_map) = config, special_map
  extras = _all_extras(options, folder / CONFIG)
  if options.get("added_tokens_decoder") is not None:
    listed = _decoder_tokens(
      options["added_tokens_decoder"], f"{folder / CONFIG}: added_tokens_decoder"
    )
  else:
    order = (*_NAMES, *named, *of_map)
    both = {**named, **of_map}
    named = {name: both.get(name) for name in order}
    extras += _all_extras(special, folder / MAP)
    are_special = {t.content for t in (*named.values(), *extras) if isinstance(t, Added)}
    listed = _legacy_tokens(folder / ADDED, are_special)
  listed.sort(key=lambda token: token.id or 0)
  for key in ("content", "id"):
    seen = set()
    for value in (getattr(token, key) for token in listed):
      if value in seen:
        raise UserError(
          f"{folder}: two added tokens have the {key} {shown(value)}; each needs its own"
        )
      seen.add(value)
  known, unlisted = {token.content for token in listed}, []
  called = [dataclasses.replace(t, is_named=True) for t in named.values() if isinstance(t, Added)]
  for token in (*called, *extras):
    if token.content not in known:
      known.add(token.content)
      unlisted.append(token)
  return (*listed, *unlisted)


def _decoder_tokens(decoder: Any, where: str) -> list[Added]:
  """The tokens of an `added_tokens_decoder`, an object from ids to tokens."""
  listed = []
  for key, token in foreign.mapping(decoder, where).items():
    entry = f"{where}[{shown(key)}]"
    if not (key.isascii() and key.isdigit() and len(key) < 20):
      raise UserError(f"{entry} must have an id as its key")
    i = foreign.token_id(int(key), entry)
    token = _added(foreign.mapping(token, entry), entry, special=False, id=i)
    listed.append(dataclasses.replace(token, replaces=True))
  return listed


def _legacy_tokens(path: pathlib.Path, are_special: set[str]) -> list[Added]:
  """The tokens of an added_tokens.json, an object from texts to ids."""
  listed = []
  for content, i in _read_json(path).items():
    if not content:
      raise UserError(f"{path}: a token must have a text, got ''")
    is_special = content in are_special
    i = foreign.token_id(i, f"{path}: {shown(content)}")
    listed.append(Added(content, i, normalized=not is_special, special=is_special))
  return listed


def _all_extras(content: Mapping, path: pathlib.Path) -> list[Added]:
  # transformers reads the first of these names only where the second, its new one, is not used.
  name = next(
    (n for n in ("extra_special_tokens", "additional_special_tokens") if content.get(n)), None
  )
  return _extras(content[name], f"{path}: {name}") if name else []


def _extras(tokens: Any, where: str) -> list[Added]:
  """Tokens in a list, or in an object by their names in the model."""
  if isinstance(tokens, dict):
    tokens = list(tokens.values())
  if not isinstance(tokens, list):
    raise UserError(f"{where} must be a list of tokens, got {shown(tokens)}")
  return [_token(token, f"{where}[{number}]") for number, token in enumerate(tokens)]


def _named(token: Any, where: str) -> Added | int:
  """A token that is given by a text, by an object with its content, or by its id."""
  return foreign.token_id(token, where) if type(token) is int else _token(token, where)


def _token(token: Any, where: str) -> Added:
  if isinstance(token, str) and token:
    return Added(token)
  if not isinstance(token, dict):
    raise UserError(f"{where} must be a text or an id, got {shown(token)}")
  return _added(token, where, special=True, id=None)


def _added(token: Mapping, where: str, *, special: bool, id: int | None) -> Added:
  content = token.get("content")
  if not (isinstance(content, str) and content):
    raise UserError(f"{where}: content must be a text, got {shown(content)}")
  flags = {
    name: foreign.flag(token.get(name), f"{where}: {name}") for name in _FLAGS if name in token
  }
  flags["special"] = special or flags.get("special", False)
  # As in tokenizers: a token is compared with normalized text unless it is special.
  flags.setdefault("normalized", not flags["special"])
  return Added(content, id, **flags)


def _ids(ids: Any, where: str) -> tuple[int, ...]:
  """One id or a list of ids."""
  if ids is None:
    return ()
  if not isinstance(ids, list):
    return (foreign.token_id(ids, where),)
  return tuple(dict.fromkeys(foreign.token_id(i, where) for i in ids))


def write_folder(folder: pathlib.Path, special: SpecialTokens, tokenizer_class: str | None):
  """Writes files that `read_folder` and transformers understand alike.

  They are tokenizer_config.json and, if there are several stop tokens, generation_config.json.

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
    "chat_template": special.chat_template,
    "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {
      str(token.id): {"content": token.content, **token.flags}
      for token in special.added
      if token.id is not None
    }
    or None,
    **dict(special.named),
  }
  given = {name: value for name, value in entries.items() if value is not None}
  write_whole(folder / CONFIG, json.dumps(given, ensure_ascii=False, indent=2).encode())
  if special.stops:
    ids = json.dumps({"eos_token_id": list(special.stops)}, indent=2)
    write_whole(folder / GENERATION, ids.encode())


def write_whole(path: pathlib.Path, content: bytes):
  """Writes a file atomically, so that no other process ever reads an incomplete file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(content)
  os.replace(partial, path)


def _read_json(path: pathlib.Path) -> dict:
  # A link to nothing, a folder or a pipe is there, and is refused.
  return foreign.read_json(path, foreign.TOKENIZER_BYTES) if os.path.lexists(path) else {}
