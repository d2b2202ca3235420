"""Reads a tokenizer.json, and checks it before the `tokenizers` package sees it.

Called by bpe. Imports core only.

The package trusts its file. It takes memory for every id up to the largest, renumbers ids in silence, panics where a
number is out of range, and pads or cuts what it encodes. So the ids, and all that can make a short file take long or
fill the memory, are checked here.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import shown

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# The bytes that a byte of text may become by all replacements together. Known rules write a space as three bytes.
_MAX_GROWTH = 1000


def read(path: pathlib.Path) -> tuple[str, dict]:
  """The content of a tokenizer.json without its padding and truncation, as JSON and parsed.

  Raises:
    UserError: the file cannot be read or is damaged, or the package would misread it.
  """
  where = f"tokenizer.path={str(path)!r}"
  raw = foreign.read_bytes(path, foreign.TOKENIZER_BYTES)
  try:
    content, text = foreign.parse_json(raw, str(path)), raw.decode("utf-8-sig")
    model = foreign.mapping(content.get("model"), "model")
    ids = _ids(model)
    _check_added(content.get("added_tokens"), ids)
    for rule in _rules(content.get("post_processor")):
      _check_post_processor(rule, set(ids.values()))
    for name in ("normalizer", "decoder"):
      _check_growth(name, content.get(name))
    if model.get("dropout"):
      raise UserError(f"model.dropout={shown(model['dropout'])} must be null, or ids are random")
  except UserError as error:
    raise UserError(f"{where} is not a tokenizer.json: {error}") from error
  if any(content.get(name) is not None for name in ("padding", "truncation")):
    content |= {"padding": None, "truncation": None}
    text = json.dumps(content)
  return text, content


def _ids(model: Mapping) -> dict[str, int]:
  """The ids of the model's own tokens.

  Raises:
    UserError: the vocabulary has another form, or ids are out of range or not unique.
  """
  vocab, kind = model.get("vocab"), model.get("type")
  if kind is not None and kind not in _MODELS:
    raise UserError(f"model.type={shown(kind)} must be one of {', '.join(_MODELS)}")
  if isinstance(vocab, list):
    return _unigram_ids(vocab, model.get("unk_id"))
  ids = foreign.mapping(vocab, "model.vocab")
  for token, i in ids.items():
    # Compared at once, as there may be over 100,000: `token_id` makes the message.
    if type(i) is not int or not 0 <= i < foreign.MAX_IDS:
      foreign.token_id(i, f"model.vocab[{shown(token)}]")
  if len(set(ids.values())) < len(ids):
    seen: dict[int, str] = {}
    for token, i in ids.items():
      if i in seen:
        raise UserError(f"tokens {shown(seen[i])} and {shown(token)} both have the id {i}")
      seen[i] = token
  return ids


def _unigram_ids(vocab: list, unknown: Any) -> dict[str, int]:
  ids = {}
  if len(vocab) > foreign.MAX_IDS:
    raise UserError(f"model.vocab must have at most {foreign.MAX_IDS} tokens")
  for i, entry in enumerate(vocab):
    is_pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    if not is_pair or type(entry[1]) not in (int, float) or not math.isfinite(entry[1]):
      raise UserError(f"model.vocab[{i}] must be a text and a number, got {shown(entry)}")
    if entry[0] in ids:
      raise UserError(f"token {shown(entry[0])} has two ids, {ids[entry[0]]} and {i}")
    ids[entry[0]] = i
  if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
    raise UserError(f"model.unk_id={shown(unknown)} must be one of its {len(vocab)} tokens")
  return ids


def _check_added(added: Any, ids: dict[str, int]):
  """Checks the added tokens, and adds theirs to `ids`.

  Raises:
    UserError: an entry has another form, or an id belongs to another token.
  """
  if not isinstance(added, list):
    raise UserError(f"added_tokens must be a list, got {shown(added)}")
  owners, seen = {i: token for token, i in ids.items()}, set()
  for number, entry in enumerate(added):
    where = f"added_tokens[{number}]"
    token = foreign.mapping(entry, where).get("content")
    if not (isinstance(token, str) and token):
      raise UserError(f"{where}: content must be a text, got {shown(token)}")
    i = foreign.token_id(entry.get("id"), f"{where}: id")
    if token in seen:
      raise UserError(f"the added token {shown(token)} is there twice")
    seen.add(token)
    if owners.get(i, token) != token:
      raise UserError(f"tokens {shown(owners[i])} and {shown(token)} both have the id {i}")
    if ids.get(token, i) != i:
      raise UserError(f"token {shown(token)} has two ids, {ids[token]} and {i}")
    ids[token], owners[i] = i, token


def _rules(rule: Any) -> Iterator[Mapping]:
  """All rules of a part, those inside a sequence of rules included."""
  waiting = [rule]
  while waiting:
    rule = waiting.pop()
    if isinstance(rule, Mapping):
      yield rule
      waiting += [value for value in rule.values() if isinstance(value, Mapping | list)]
    elif isinstance(rule, list):
      waiting += rule


def _check_post_processor(rule: Mapping, known: set[int]):
  """Refuses ids that no token has: they would come before or after every text."""
  ids = rule.get("ids")
  # Bert's and Roberta's rules give a token as its text and its id.
  pairs = [rule[name] for name in ("sep", "cls") if isinstance(rule.get(name), list)]
  for i in (*(ids if isinstance(ids, list) else []), *(pair[-1] for pair in pairs if pair)):
    if type(i) is not int or i not in known:
      raise UserError(f"post_processor names the id {shown(i)}, which no token has")


def _check_growth(name: str, part: Any):
  """Refuses replacements by longer texts, one after another: a dozen of them would fill the memory with one letter."""
  growth = 1.0
  for rule in _rules(part):
    size = lambda text: len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
    pattern = rule.get("pattern")
    replaced = size(pattern.get("String")) if isinstance(pattern, Mapping) else 0
    growth *= max(1.0, size(rule.get("content")) / max(1, replaced), size(rule.get("prepend")))
    if growth > _MAX_GROWTH:
      raise UserError(f"{name} makes text more than {_MAX_GROWTH} times as long")
