"""Mutants of files: what a broken copy, another program or an enemy may have made of a valid one.

Used by the modules of cases in this folder.
"""

import copy
import json
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LONGEST = 1200  # letters of a message, in which `errors.one_line` cuts them

Files = dict[str, bytes]  # path below a folder -> content

# Values that JSON can hold where another was expected.
ODD: tuple[Any, ...] = (
  *(None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, 2**64, 10**6, 10**30, 10**400, 0.5, 1e308),
  *(
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00\n",
    "\ud800",
    "a" * 5000,
    "../x.safetensors",
    "/etc",
  ),
  *("model.safetensors", "linear", "llama3", "yarn", [], {}, [[]], [None], {"a": 1}, [0] * 50),
  *({"rope_type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, ["full_attention"]),
)


def json_text(rng: random.Random, valid: bytes, keys: Sequence[str]) -> bytes:
  """Another value in some place, a key more or less, the same key twice, or deep nesting.

  Args:
    rng: decides.
    valid: the text of some JSON value; anything else gets damaged bytes.
    keys: names that an object may get.
  """
  try:
    tree = [json.loads(valid)]
  except (ValueError, RecursionError):  # already a mutant
    return damaged(rng, valid)
  places = list(_places(tree))
  parent, key = rng.choice(places)
  inner = parent[key]
  roll = rng.random()
  if isinstance(inner, dict) and roll < 0.4:
    inner[rng.choice(keys)] = copy.deepcopy(rng.choice(ODD))
  elif roll < 0.75:
    parent[key] = copy.deepcopy(rng.choice(ODD))
  elif roll < 0.85 and isinstance(parent, dict):
    parent[key + rng.choice(("x", ".", "\n", "e" * 300))] = parent.pop(key)
  elif roll < 0.92 and isinstance(parent, dict):
    del parent[key]
  elif roll < 0.96:
    parent[key] = "@"  # `dumps` calls itself, and could not write what is meant
    depth = rng.choice((10, 40, 900, 100_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = opened * depth + b"1" + closed * depth
    return json.dumps(tree[0]).encode().replace(b'"@"', nested, 1)
  else:
    text = json.dumps(tree[0])
    return (text[:1] + f'"{key}": {json.dumps(rng.choice(ODD))}, ' + text[1:]).encode()
  return json.dumps(tree[0], ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
  """(parent, key) of every value below a node, at most 200 of a list or object."""
  keys = list(node)[:200] if isinstance(node, dict) else range(min(len(node), 200))
  for key in keys:
    yield node, key
    if isinstance(node[key], dict | list):
      yield from _places(node[key])


def damaged(rng: random.Random, valid: bytes) -> bytes:
  """Bits flipped, or a piece cut out, doubled or put elsewhere, as in a broken copy."""
  start, end = sorted(rng.randrange(len(valid) + 1) for _ in range(2))
  kinds: tuple[Callable[[], bytes], ...] = (
    lambda: valid[:start],
    lambda: valid[:start] + valid[end:],
    lambda: valid[:end] + valid[start:],
    lambda: valid[:start] + rng.randbytes(rng.choice((1, 4, 100))) + valid[start:],
    lambda: valid[:start] + bytes(end - start) + valid[end:],
    lambda: rng.choice((b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>")),
  )
  if valid and rng.random() < 0.5:
    flipped = bytearray(valid)
    for _ in range(rng.choice((1, 1, 3, 30))):
      flipped[rng.randrange(len(valid))] ^= 1 << rng.randrange(8)
    return bytes(flipped)
  return rng.choice(kinds)()


def write(folder: pathlib.Path, files: Files):
  """Writes the files of a case into a folder."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def bad_message(error: Exception, folder: pathlib.Path) -> str:
  """What is wrong with a refusal, which is to be one printable line; "" if nothing is."""
  message = str(error).replace(str(folder), "")
  if not message.isprintable():
    return f"a message that is not printable: {ascii(message)[:300]}"
  if not message.strip() or len(message) > LONGEST:
    return f"a message of {len(message)} characters: {message[:100]}"
  return ""
