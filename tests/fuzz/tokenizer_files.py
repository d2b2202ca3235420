"""Damaged and hostile tokenizer files: what makes them, and what reads them as a run would."""

import copy
import functools
import itertools
import json
import pathlib
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from instructjax.core.errors import UserError
from instructjax.data import tokenizer as tokenizers_lib
from tests.fuzz.mutants import Files

GGUF = "model.gguf"
_METADATA = "metadata.json"  # becomes a GGUF file
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = (
  "Name a colour.\n\n  Blue\t1 \u00e9\U0001f642",
  f"{START}user\nHi{END} </s><s>[PAD]<unk>",
  "a" * 300,
  "\uff1c|im_end|\uff1e\udcff",
)
# Values that JSON can hold where another was expected.
ODD: tuple[Any, ...] = (
  *(None, True, False, 0, 1, -1, 3, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -1e308, float("nan")),
  *("", "x", "\x00", "\ud800", "<|im_end|>", "a" * 5000, "(a+)+$", "("),
  *([], {}, [[]], [None], {"a": 1}, [["a", 1]], {"type": "Sequence"}, [0] * 50),
)


@functools.cache
def _byte_level() -> Files:
  """A byte-level BPE with tokens of all kinds beside it."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

  vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  vocab |= {"th": 256, "the": 257}
  raw = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = decoders.ByteLevel()
  raw.add_special_tokens(["<|endoftext|>", "<s>"])
  raw.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 259)]
  )
  flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
  decoder = {"260": {"content": START, "special": True} | flags, "261": {"content": END} | flags}
  return _as_bytes(
    {
      "tokenizer.json": json.loads(raw.to_str()),
      "tokenizer_config.json": {
        "eos_token": END,
        "bos_token": {"content": "<s>", "lstrip": False},
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [START],
        "chat_template": TEMPLATE,
      },
      "special_tokens_map.json": {"unk_token": "<|endoftext|>", "eos_token": END},
      "generation_config.json": {"eos_token_id": [261, 258]},
      "config.json": {"eos_token_id": 258, "vocab_size": 262},
    }
  )


@functools.cache
def _legacy() -> Files:
  """The same vocabulary in the spelling of old files."""
  files = dict(_byte_level())
  config = json.loads(files["tokenizer_config.json"])
  del config["added_tokens_decoder"]
  return files | _as_bytes(
    {"tokenizer_config.json": config, "added_tokens.json": {START: 260, END: 261}}
  )


@functools.cache
def _unigram() -> Files:
  """A tokenizer.json of another kind, with rules that change texts."""
  letters = [[letter, -1.0 - i / 64] for i, letter in enumerate(map(chr, range(9, 127)))]
  content = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
      **{"strategy": {"Fixed": 4}, "direction": "Left", "pad_to_multiple_of": None},
      **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
    },
    "added_tokens": [
      {"id": i, "content": text, "special": True}
      | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
      for i, text in enumerate(("<unk>", END))
    ],
    "normalizer": {
      "type": "Sequence",
      "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
    },
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s"}}
    | {"behavior": "Isolated", "invert": False},
    "post_processor": {"type": "BertProcessing", "sep": [END, 1], "cls": ["<unk>", 0]},
    "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    "model": {
      **{"type": "Unigram", "unk_id": 0, "byte_fallback": False},
      "vocab": [["<unk>", 0.0], [END, 0.0], ["\u2581", -2.0], *letters],
    },
  }
  return _as_bytes({"tokenizer.json": content, "tokenizer_config.json": {"eos_token": END}})


@functools.cache
def _sentencepiece() -> Files:
  """A sentencepiece model whose control tokens have all types, with files beside it."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "tokenizer.model"
    lines = [f"the king of {a}{b}" for a, b in itertools.product("abcdefgh", repeat=2)]
    tokenizers_lib.train_tokenizer(lines, 22, path, 0)
    model = path.read_bytes()
  from sentencepiece import sentencepiece_model_pb2

  pb2: Any = sentencepiece_model_pb2
  proto = pb2.ModelProto.FromString(model)
  proto.pieces.add(piece=START, score=0.0, type=4)
  proto.pieces.add(piece=END, score=-1.0, type=1)
  size = len(proto.pieces)
  config = {
    "eos_token": END,
    "chat_template": TEMPLATE,
    "added_tokens_decoder": {str(size): {"content": "<tool>", "special": False}},
  }
  return {"tokenizer.model": proto.SerializeToString()} | _as_bytes(
    {"tokenizer_config.json": config, "generation_config.json": {"eos_token_id": [size - 1, 1]}}
  )


@functools.cache
def _gguf() -> Files:
  """The metadata of a GGUF file with a byte-level BPE; `_gguf_file` writes it."""
  files = _byte_level()
  model = json.loads(files["tokenizer.json"])["model"]
  tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", "<s>", START, END]
  ids = {"bos": 259, "eos": 261, "eot": 258, "unknown": 258, "padding": 258}
  content = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 4, 1],
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": TEMPLATE,
  }
  content |= {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
  return _as_bytes({_METADATA: content})


@functools.cache
def _gguf_pieces() -> Files:
  """The same for a sentencepiece model."""
  from sentencepiece import sentencepiece_model_pb2

  pb2: Any = sentencepiece_model_pb2
  pieces = pb2.ModelProto.FromString(_sentencepiece()["tokenizer.model"]).pieces
  content = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
    "tokenizer.ggml.scores": [float(piece.score) for piece in pieces],
    "tokenizer.ggml.token_type": [piece.type for piece in pieces],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eom_token_id": len(pieces) - 1,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.chat_template": TEMPLATE,
  }
  return _as_bytes({_METADATA: content})


def _gguf_file(content: bytes) -> bytes:
  """A GGUF file of these metadata; values that its types cannot hold are left out."""
  text = lambda value: _sized(value.encode("utf-8", "surrogatepass"))
  kinds = {bool: (7, "<?"), int: (11, "<q"), float: (12, "<d"), str: (8, "")}
  entries = []
  for key, value in json.loads(content).items() if content.startswith(b"{") else ():
    parts = value if isinstance(value, list) else [value]
    kind = type(parts[0]) if parts else str
    is_plain = kind in kinds and all(type(part) is kind for part in parts)
    if not is_plain or (kind is int and not all(abs(part) < 2**63 for part in parts)):
      continue
    number, form = kinds[kind]
    packed = b"".join(text(part) if kind is str else struct.pack(form, part) for part in parts)
    head = struct.pack("<IIQ", 9, number, len(parts)) if isinstance(value, list) else None
    entries.append(text(key) + (head or struct.pack("<I", number)) + packed)
  return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def _sized(content: bytes) -> bytes:
  return struct.pack("<Q", len(content)) + content


def _as_bytes(contents: dict[str, Any]) -> Files:
  return {name: json.dumps(content).encode() for name, content in contents.items()}


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
  """The path of every value inside a JSON value; of a long list or object, only a part."""
  yield path
  if isinstance(value, dict):
    for key in list(value)[:40]:
      yield from _places(value[key], (*path, key))
  elif isinstance(value, list):
    for i in range(min(len(value), 6)):
      yield from _places(value[i], (*path, i))


def _mutate_json(content: bytes, rng: random.Random) -> bytes:
  """Changes one to three values of a JSON text: replaces, removes, doubles, nests or renames them."""
  value = json.loads(content)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    path = rng.choice(list(_places(value)))
    if not path:
      value = copy.deepcopy(rng.choice(ODD)) if rng.random() < 0.2 else value
      continue
    parent = value
    for key in path[:-1]:
      parent = parent[key]
    _change(parent, path[-1], rng)
  return json.dumps(value).encode()


def _change(parent: Any, key: Any, rng: random.Random):
  kind = rng.randrange(7)
  if kind == 0:
    del parent[key]
  elif kind == 1 and isinstance(parent, list):
    parent.insert(key, copy.deepcopy(parent[key]))
  elif kind == 2 and isinstance(parent, dict):
    parent[rng.choice(("", "x", "-1", "\ud800", "9" * 30, END, str(key) + "_"))] = parent.pop(key)
  elif kind == 3:
    parent[key] = [copy.deepcopy(parent[key])] * rng.choice((1, 2, 9))
  elif kind == 4 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
    parent[key] += rng.choice((-1, 1, 7, 2**21, 2**31, -(2**31), 2**64))
  else:
    parent[key] = copy.deepcopy(rng.choice(ODD))


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
  """Flips, removes, inserts or doubles some bytes, or cuts the rest off."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 4, 16))):
    at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del data[at : at + rng.choice((1, 2, 40))]
    elif kind == 2:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
    elif kind == 3:
      data[at:at] = data[at : at + rng.choice((4, 200))]
    elif kind == 4 and rng.random() < 0.3:
      del data[at:]
    elif at < len(data):
      data[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
  return bytes(data)


def _mutate_model(content: bytes, rng: random.Random) -> bytes:
  """Changes a piece or a rule of a sentencepiece model."""
  from sentencepiece import sentencepiece_model_pb2

  pb2: Any = sentencepiece_model_pb2
  proto = pb2.ModelProto.FromString(content)
  for _ in range(rng.choice((1, 2, 5))):
    piece = proto.pieces[rng.randrange(len(proto.pieces))]
    kind = rng.randrange(8)
    if kind == 0:
      piece.type = rng.randrange(1, 7)
    elif kind == 1:
      piece.score = rng.choice((float("nan"), float("inf"), -1e38, 0.0))
    elif kind == 2:
      piece.piece = rng.choice(("", "a", "\n", "\u2581", "<0x41>", END, "x" * 5000))
    elif kind == 3:
      proto.normalizer_spec.precompiled_charsmap = rng.randbytes(rng.choice((3, 4, 64, 1024)))
    elif kind == 4:
      name = rng.choice(("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"))
      setattr(proto.normalizer_spec, name, rng.random() < 0.5)
    elif kind == 5:
      name = rng.choice(("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"))
      setattr(proto.trainer_spec, name, rng.choice((-1, 0, 5, 2**31 - 1, -(2**31))))
    elif kind == 6:
      proto.trainer_spec.model_type = rng.randrange(1, 5)
      proto.trainer_spec.byte_fallback = rng.random() < 0.5
    else:
      proto.pieces.add().CopyFrom(piece)
  return proto.SerializeToString()


SEEDS: tuple[tuple[str, Callable[[], Files]], ...] = (
  ("byte-level", _byte_level),
  ("legacy", _legacy),
  ("unigram", _unigram),
  ("sentencepiece", _sentencepiece),
  ("gguf", _gguf),
  ("gguf pieces", _gguf_pieces),
)


def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
  """Yields (name, content of each file of a folder) without end; every folder has one damaged file."""
  for number in itertools.count():
    seed, make = rng.choice(SEEDS)
    files = dict(make())
    name = rng.choice(list(files))
    if name.endswith(".json"):
      is_text = name != _METADATA and rng.random() < 0.15
      mutate = _mutate_bytes if is_text else _mutate_json
    else:
      mutate = _mutate_bytes if rng.random() < 0.5 else _mutate_model
    files[name] = mutate(files[name], rng)
    if name == _METADATA:
      files = {GGUF: _gguf_file(files[name])}
    yield f"{number}: {name} of {seed}", files


def run(folder: pathlib.Path):
  """Loads the tokenizer of a folder and uses it as a run does.

  Raises:
    UserError: the files or a text are refused.
    AssertionError: a text was encoded to a control token, or to an id outside the vocabulary.
  """
  is_gguf = (folder / GGUF).exists()
  tokenizer = tokenizers_lib.load(folder / GGUF if is_gguf else folder)
  for text in TEXTS:
    try:
      ids = tokenizer.encode(text)
      prompt = tokenizer.encode_prompt(text)
    except UserError:
      continue
    assert all(0 <= i < tokenizer.vocab_size for i in (*ids, *prompt)), "an id out of range"
    assert not set(tokenizer.stop_ids[:1]) & set(ids), "a text ends itself"
    tokenizer.decode(ids)
    tokenizer.decode(prompt)
  if tokenizer.chats.has_template:
    tokenizer.chats.render_one([{"role": "user", "content": "Name a colour."}])
  with tempfile.TemporaryDirectory() as copy_of:
    tokenizer.save(copy_of)
    assert tokenizers_lib.load(copy_of).encode("the king") == tokenizer.encode("the king")
