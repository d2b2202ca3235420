"""Damaged and odd data files for every reader of `instructjax.data.sources`, and what reading one must do.

A case is a file and, in the file `source`, the source that reads it. tests/data/test_sources.py runs a few cases in the
suite.
"""

import csv
import gzip
import io
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.records import KINDS, Chat, Demonstration, Document, Ranking
from tests.fuzz import mutants
from tests.fuzz.mutants import Files

SOURCE = "source"  # the file of a case that says how it is read
H, A = "\n\nHuman:", "\n\nAssistant:"
ASK, SAY = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}
# A row of each format.
SEEDS: list[dict[str, Any]] = [
  {"text": "Once upon a time"},
  {"prompt": "p\n", "response": "r"},
  {"prompt": "p", "completion": [SAY]},
  {"messages": [{"role": "system", "content": ""}, ASK, {**SAY, "weight": 1}]},
  {
    "messages": [
      {"role": "user", "content": [{"type": "text", "text": "a"}]},
      {**SAY, "tool_calls": None},
    ]
  },
  {"messages": json.dumps([ASK, SAY])},
  {"prompt": "p", "responses": ["a", "b", ""], "ranks": [1, 2, 2], "labeler": "ann"},
  {"prompt": [ASK], "responses": ["a", [SAY]], "scores": [0.5, 2]},
  {"prompt": "p", "responses": ["a", "b"], "comparisons": [{"a": 0, "b": 1, "winner": None}]},
  {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No."}], "prompt": "Hi."},
  {"prompt": "Q: a\n", "chosen": "Q: a\nb", "rejected": "Q: a\nc", "labeler": 7},
  {"chosen": f"{H} a{A} b", "rejected": f"{H} a{A} c"},
  {"prompt": f"{H} a{A}", "chosen": " b", "rejected": " c"},
  {"instruction": "Add.", "input": "1 2", "output": "3"},
  {"instruction": "q", "context": "", "response": "r"},
  {
    "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    "system": "s",
  },
  {"context": [ASK], "completions": [{"rank": i, "completion": [SAY]} for i in range(3)]},
  {"instruction": "q", "completions": [{"response": "a", "overall_score": i} for i in range(2)]},
  {"prompt": "p", "response": "r", "helpfulness": 3, "verbosity": 1},
  {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -1},
  {"context": [ASK], "response1": "a", "response2": "b", "overall_preference": 2},
  {"input": {"messages": [ASK]}, "preferred_output": [SAY], "non_preferred_output": [ASK]},
  {
    "fields": {"prompt": "p", "a": "x", "b": "y"},
    "responses": {"q": [{"value": ["a", "b"], "user_id": "u", "status": "submitted"}]},
  },
  {
    "fields": {"prompt": "p", "a": "x", "b": "y"},
    "responses": [
      {"values": {"q": {"value": [{"value": n, "rank": 1} for n in "ab"]}}, "user_id": "u"}
    ],
  },
  {"prompt": "p", "a": "x", "b": "y", "q.responses": [["a", "b"]], "q.responses.users": ["u"]},
  {
    "prompt": "p",
    "a": "x",
    "b": "y",
    "q": [{"user_id": "u", "value": {"rank": [1, 2], "value": ["a", "b"]}, "status": None}],
    "q-suggestion": None,
  },
  {
    "data": {"prompt": "p", "items": [{"id": "1", "body": "a"}, {"id": "2", "html": "b"}]},
    "annotations": [{"completed_by": 1, "result": [{"value": {"ranker": ["2", "1"]}}]}],
  },
  {
    "data": {"prompt": "p", "answer1": "a", "answer2": "b"},
    "annotations": [{"completed_by": {"id": 2}, "result": [{"value": {"selected": "left"}}]}],
  },
]
KEYS = sorted(
  {key for row in SEEDS for key in row} | {"role", "content", "from", "weight", "train", "mask"}
)
ODD: list[Any] = [
  None, True, False, 0, 1, -1, 1.0, 1.5, 2**31, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("inf"),
  "", " ", "\n", "\0", "a\0b", "\ud800", "\u2028", "\ufeff", "é", "x" * 3000, "[", "[{", "{}", "null", "\x1b[31m",
  "[/b]", H, A, f"{A} a", f"{H} a{A} b{H} c", "Human: a", json.dumps([ASK]), str([ASK]),
  [], {}, [[]], [None], [1], ["a"], [ASK], [SAY], [ASK, SAY], [SAY, ASK], {"role": "tool", "content": "x"},
  {"a": 0, "b": 1, "winner": 0}, {"value": "a", "rank": 1}, {"ranker": {"rank": ["1", "2"]}},
  {"user_id": 1, "value": []},
]  # fmt: skip


# Options of a source; keys that rows have, and some that no row has.
OPTIONS = (
  *("",) * 40,
  *("?format=own", "?format=alpaca", "?format=argilla", "?prompt=prompt"),
  *("?text=text.0,a", "?format=", "?format=x&format=y", "?", "?=", "?&", "?prompt", "?prompt=%00"),
  *("?response=messages.-1.content", "?prompt=a&response=b", "?text=" + "x" * 3000, "?data_dir=/"),
  *("?responses=a,b&ranks=q", "?rank=1&labeler=labeler", "?chosen=a.b.c.d&rejected=..", "?é=\n"),
)


def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
  """Yields (source, its file and the source itself) without end."""
  while True:
    source, data = _case(rng)
    name = source.partition(":")[2].partition("?")[0]
    yield source, {name: data, SOURCE: source.encode()}


def _case(rng: random.Random) -> tuple[str, bytes]:
  """A file: (its source without a folder, such as `jsonl:a.jsonl.gz?format=alpaca`, its content)."""
  rows = [_mutated(rng, rng.choice(SEEDS)) for _ in range(rng.choice((0, 1, 1, 2, 3, 5)))]
  if rng.random() < 0.3:  # rows of one format, which a table can hold
    rows = [_mutated(rng, seed) for seed in [rng.choice(SEEDS)] * rng.choice((1, 2, 5))]
  scheme = rng.choice(("jsonl", "jsonl", "jsonl", "hh", "parquet"))
  data, name = (_parquet if scheme == "parquet" else rng.choice(_WRITERS))(rng, rows)
  for _ in range(rng.choice((0, 0, 0, 1, 2))):
    data = rng.choice(_DAMAGES)(rng, data)
  options = rng.choice(OPTIONS)
  if rng.random() < 0.1:
    names = ("prompt", "response", "text", "responses", "ranks", "chosen", "rejected", "x")
    key = lambda: rng.choice([*KEYS, "", "a.b", "messages.0.content", "\x1b", "q.responses"])
    options = "?" + "&".join(f"{rng.choice(names)}={key()}" for _ in range(rng.randint(1, 4)))
  return f"{scheme}:{name}{options}", data


def run(folder: pathlib.Path):
  """Reads a case as records of every kind, with bad records refused and skipped.

  Raises:
    UserError: no kind could be read: the last refusal.
    AssertionError: a record does not hold together, or a refusal is not one line.
  """
  scheme, _, rest = (folder / SOURCE).read_bytes().decode().partition(":")
  refusal, was_read = None, False
  for kind in KINDS:
    for on_bad_record in ("raise", "skip"):
      for split in ("all", "train"):
        try:
          records = sources.load(
            f"{scheme}:{folder}/{rest}",
            kind,
            split,
            seed=0,
            validation_fraction=0.3,
            on_bad_record=on_bad_record,
          )
        except UserError as error:
          refusal = error
          assert not (found := mutants.bad_message(error, folder)), found
          continue
        was_read = True
        for record in records:
          _require_whole(record)
  if refusal and not was_read:
    raise refusal


def _require_whole(record: Any):
  assert record.where
  if isinstance(record, Document):
    assert record.text.strip() and record.text.encode()
    return
  if isinstance(record.prompt, Chat):
    assert record.prompt.messages[-1][0] == "user"
    assert all(isinstance(text, str) for message in record.prompt.messages for text in message)
  else:
    assert record.prompt.strip() and record.prompt.encode()
  if isinstance(record, Demonstration):
    assert record.response.strip() and f"{H}" not in record.response or A not in str(record.prompt)
  if isinstance(record, Ranking):
    assert len(record.responses) == len(record.ranks) >= 2
    assert all(type(rank) is int and 1 <= rank < 2**31 for rank in record.ranks)
    assert all(
      isinstance(text, str) and isinstance(text.encode(), bytes) for text in record.responses
    )
    assert record.labeler is None or isinstance(record.labeler, str)


def _mutated(rng: random.Random, value: Any) -> Any:
  """A value of JSON with some of its parts replaced, dropped, doubled or nested."""
  if rng.random() < 0.06:
    return rng.choice(ODD)
  if isinstance(value, dict):
    items = [(key, _mutated(rng, item)) for key, item in value.items() if rng.random() > 0.02]
    if rng.random() < 0.05:
      items.append((rng.choice(KEYS), rng.choice(ODD)))
    if items and rng.random() < 0.03:
      items[0] = (rng.choice(KEYS), items[0][1])
    rng.shuffle(items)
    return dict(items)
  if isinstance(value, list):
    items = [_mutated(rng, item) for item in value if rng.random() > 0.03]
    return items + items[:1] * (rng.random() < 0.05) if rng.random() > 0.01 else [items]
  if isinstance(value, str) and rng.random() < 0.05:
    return value.replace("\n", rng.choice(("\r\n", "\r", "\n\n", "\n \n"))) + rng.choice(
      (H, A, " ", "\n")
    )
  return value


def _dumps(rng: random.Random, row: Any, **options) -> str:
  text = json.dumps(row, ensure_ascii=rng.random() < 0.5, **options)
  if rng.random() < 0.03:  # a key twice
    text = text.replace("{", '{"prompt": "twice", ', 1)
  if rng.random() < 0.02:
    text = text.replace("1", "9" * 5000, 1)
  if rng.random() < 0.01:
    depth = rng.choice((10, 1000, 100_000))
    text = text.replace('"', "[" * depth + "]" * depth + '"', 1)
  return text


def _jsonl(rng: random.Random, rows: list) -> tuple[bytes, str]:
  end = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n", ",\n"))
  return _encoded(rng, "".join(_dumps(rng, row) + end for row in rows)), "a.jsonl"


def _array(rng: random.Random, rows: list) -> tuple[bytes, str]:
  text = rng.choice((",\n", ",", "\n")).join(
    _dumps(rng, row, indent=rng.choice((None, 2))) for row in rows
  )
  return _encoded(rng, f"[{text}]" if rng.random() < 0.8 else text), "a.json"


def _whole(rng: random.Random, rows: list) -> tuple[bytes, str]:
  return _encoded(
    rng, _dumps(rng, {"data": rows} if rng.random() < 0.3 else rows, indent=1)
  ), "a.json"


def _csv(rng: random.Random, rows: list) -> tuple[bytes, str]:
  file = io.StringIO()
  writer = csv.writer(file)
  for row in rows:
    writer.writerow(
      [str(cell).encode("utf-8", "replace").decode() for cell in row]
      if isinstance(row, dict)
      else [row]
    )
  return _encoded(rng, file.getvalue()), "a.csv"


def _text(rng: random.Random, rows: list) -> tuple[bytes, str]:
  return _encoded(rng, f"{H} a{A} b\n".join(str(row) for row in rows)), "a.txt"


def _gzip(rng: random.Random, rows: list) -> tuple[bytes, str]:
  data = gzip.compress(_jsonl(rng, rows)[0])
  return data, rng.choice(("a.jsonl.gz", "a.jsonl"))


def _zstd(rng: random.Random, rows: list) -> tuple[bytes, str]:
  return pa.compress(_jsonl(rng, rows)[0], codec="zstd", asbytes=True), "a.jsonl.zst"


def _encoded(rng: random.Random, text: str) -> bytes:
  encoding = rng.choice(
    ("utf-8",) * 12 + ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")
  )
  return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


_WRITERS: tuple[Callable, ...] = (_jsonl, _jsonl, _jsonl, _array, _whole, _csv, _text, _gzip, _zstd)


def _parquet(rng: random.Random, rows: list) -> tuple[bytes, str]:
  """A table of the rows, with columns of odd types; of their JSON text where a column cannot hold the values."""
  rows = [row for row in rows if isinstance(row, dict)]
  names = dict.fromkeys(key for row in rows for key in row)
  columns = {}
  for name in names:
    cells = [row.get(name) for row in rows]
    try:
      column = pa.array(cells)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
      column = pa.array([json.dumps(cell) for cell in cells])
    columns[name] = _cast(rng, column)
  buffer = io.BytesIO()
  compression = rng.choice(("none", "snappy", "zstd"))
  try:
    pq.write_table(
      pa.table(columns), buffer, row_group_size=rng.choice((1, 2, 1000)), compression=compression
    )
  except (pa.ArrowException, UnicodeEncodeError, ValueError):
    pq.write_table(pa.table({"text": ["a"]}), buffer)
  return buffer.getvalue(), "a.parquet"


def _cast(rng: random.Random, column: pa.Array) -> pa.Array:
  if rng.random() < 0.7:
    return column
  types = (
    pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view(),
    pa.float32(), pa.decimal128(20, 2), pa.timestamp("s"), pa.int64(), pa.bool_(),
    pa.large_list(pa.string()), pa.list_(pa.large_string()),
  )  # fmt: skip
  try:
    return column.cast(rng.choice(types), safe=False)
  except (pa.ArrowException, NotImplementedError):
    return column


def _flipped(rng: random.Random, data: bytes) -> bytes:
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 3, 30)) if result else 0):
    result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
  return bytes(result)


def _cut(rng: random.Random, data: bytes) -> bytes:
  start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
  return rng.choice((data[:start], data[start:], data[:start] + data[end:]))


def _doubled(rng: random.Random, data: bytes) -> bytes:
  start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
  return data[:end] + data[start:]


def _inserted(rng: random.Random, data: bytes) -> bytes:
  at = rng.randint(0, len(data))
  piece = rng.choice(
    (b"\0", b"\0" * 64, b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"[", b"{", b'"', b"\\", b",", b"\xff\xfe", b"PAR1",
     b"}\n{")
  )  # fmt: skip
  return data[:at] + piece * rng.choice((1, 1, 1, 500)) + data[at:]


_DAMAGES: tuple[Callable, ...] = (_flipped, _cut, _doubled, _inserted)
