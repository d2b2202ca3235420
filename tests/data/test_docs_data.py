"""docs/data.md is true: its rows load, and its bad rows get the messages beside them.

A fence's info string, of which Markdown looks at the first word only, says what the block is:
  json KIND [hh] [bad]: rows of KIND, one a line. After a bad one, a `text` block has an error a row.
  text KIND SPEC [skip|absent]: what reading SPEC raises; with skip, what it logs; with absent, what
    it raises where the optional package is not installed.
  text KIND chat: an error a line of `sources.render`.
"""

import functools
import json
import pathlib
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructjax.data import chat, formats, sources
from instructjax.data.readers import READERS
from instructjax.data.records import KINDS, BadRecord, Chat, Prompt

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FENCES = [
  (info.split(), body.splitlines())
  for info, body in re.findall(r"^```(.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
GOOD = [(words[1:], rows) for words, rows in FENCES if words[0] == "json" and "bad" not in words]
BAD = [
  (words[1:-1], row, message)
  for (words, rows), (after, messages) in zip(FENCES, FENCES[1:], strict=False)
  if words[-1] == "bad"
  for row, message in zip(rows, messages if after == ["text"] else (), strict=True)
]
# Rows of the table of published formats: (name, kind, keys, example, how it is read).
TABLE = [
  (
    line.split("`")[1],
    *[cell.strip("` ") if "{" in cell else cell for cell in line.split(" | ")[1:]],
  )
  for line in PAGE.splitlines()
  if line.startswith("| `") and line.count(" | ") == 4
]
TEXTS = [(*words[1:], lines) for words, lines in FENCES if words[0] == "text" and words[1:]]
SPECS = [text for text in TEXTS if text[1] != "chat"]


def load(spec, kind, on_bad_record="raise"):
  return sources.load(
    spec, kind, "all", seed=0, validation_fraction=0.1, on_bad_record=on_bad_record
  )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """The working directory, so that paths in messages are as short as on the page."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


def scheme(words):
  return "hh" if "hh" in words else "jsonl"


def test_every_fence_is_checked_and_every_kind_and_source_is_shown():
  assert len(GOOD) + len(TEXTS) + 2 * sum(w[-1] == "bad" for w, _ in FENCES) == len(FENCES)
  assert {words[0] for words, _ in GOOD} == {words[0] for words, *_ in BAD} == set(KINDS)
  specs = [scheme(words) for words, _ in GOOD] + [spec.split(":")[0] for _, spec, *_ in SPECS]
  assert READERS.keys() <= set(specs)


@pytest.mark.parametrize(("words", "rows"), GOOD, ids=[" ".join(words) for words, _ in GOOD])
def test_every_good_row_loads_and_from_a_table_too(folder, words, rows):
  (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
  records = load(f"{scheme(words)}:rows.jsonl", words[0])
  assert len(records) == len(rows)
  if scheme(words) == "jsonl":
    for number, row in enumerate(map(json.loads, rows)):  # one file a row: their types differ
      pq.write_table(pa.Table.from_pylist([row]), folder / f"{number}.parquet")
    assert load("parquet:.", words[0]) == records


def test_every_published_format_has_a_row_of_the_table():
  assert [name for name, *_ in TABLE] == list(formats.FORMATS)
  for name, _, keys, *_ in TABLE:
    form = formats.FORMATS[name]
    before, _, after = keys.partition(";")
    if form.needs:
      assert tuple(re.findall("`(.*?)`", before)) == form.needs
    if name != "hh" and form.also is not None:
      assert tuple(re.findall("`(.*?)`", after)) == form.also


@pytest.mark.parametrize(("name", "kind", "example"), [(row[0], row[1], row[3]) for row in TABLE])
def test_every_example_of_the_table_is_read_as_its_format(folder, caplog, name, kind, example):
  # Twice, because one answer makes no ranking.
  (folder / "rows.jsonl").write_text(f"{example}\n{example}\n", encoding="utf-8")
  records = load("jsonl:rows.jsonl", kind)
  assert len(records) == (1 if name == "helpsteer" else 2)
  assert [f"read as format {name} (keys: " in line for line in caplog.messages] == [True]
  assert load(f"jsonl:rows.jsonl?format={name}", kind) == records
  if kind == "comparisons" and name != "helpsteer":  # the examples prefer Hi, or Ho
    best = [text for text, rank in zip(records[0].responses, records[0].ranks) if rank == 1]
    assert [text.strip() in ("Hi.", "Ho.") for text in best] == [True]


@pytest.mark.parametrize(("words", "row", "message"), BAD, ids=[message for *_, message in BAD])
def test_every_bad_row_gets_the_message_beside_it(folder, words, row, message):
  line = int(message.split(":")[1])
  (folder / f"{words[0]}.jsonl").write_text("\n" * (line - 1) + row, encoding="utf-8")
  with pytest.raises(BadRecord) as error:
    load(f"{scheme(words)}:{words[0]}.jsonl", words[0])
  assert str(error.value) == message


def write_examples(folder):
  """What the page says that the files of its last sections hold."""
  pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
  pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), folder / "answers.parquet")
  (folder / "renamed.parquet").write_text("Once upon a time ...")
  (folder / "mixed.jsonl").write_text('{"text": "good"}\n{}\n{}\n{"text": ""}\n')
  (folder / "unknown.jsonl").write_text('{"question": "q", "answer": "a"}\n')
  (folder / "windows.jsonl").write_text('{"prompt": "p"}\n', encoding="utf-16")
  (folder / "array.json").write_text('[\n{"prompt": "a"}\n{"prompt": "b"}\n]')
  pq.write_table(pa.table({"prompt": ["a"]}), folder / "table.jsonl")


@pytest.mark.parametrize(
  ("kind", "spec", "tags", "lines"),
  [(kind, spec, tags, lines) for kind, spec, *tags, lines in SPECS],
  ids=[spec for _, spec, *_ in SPECS],
)
def test_every_source_gets_the_message_beside_it(
  folder, caplog, monkeypatch, kind, spec, tags, lines
):
  write_examples(folder)
  if tags == ["absent"]:
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
  elif spec.startswith("datasets:"):
    reason = "the optional package datasets is absent: pip install 'instructjax[datasets]'"
    datasets = pytest.importorskip("datasets", reason=reason)
    datasets.disable_progress_bars()
    chats = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "Hi."}]}])
    datasets.DatasetDict(train=chats, test=chats).save_to_disk(folder / "chats")
  if tags == ["skip"]:
    load(spec, kind, "skip")
    assert caplog.messages == lines
    return
  with pytest.raises(ValueError) as error:
    load(spec, kind)
  assert [str(error.value)] == lines


def test_every_chat_that_a_template_refuses_gets_its_message():
  ((kind, _, lines),) = [text for text in TEXTS if text[1] == "chat"]
  refusing = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
  )
  templates = [("tokenizer.model", None)] + [("tokenizer.json", refusing + "{% endif %}")] * 2
  prompts = [
    [Prompt(Chat((("user", "Hi."),)))],
    [Prompt(Chat((("system", "Be brief."), ("user", "Hi."))))],
    [Prompt("plain")] * 3 + [Prompt(Chat((("user", "Hi.<|im_end|>"),)))],
  ]
  for line, (name, template), records in zip(lines, templates, prompts, strict=True):
    where = pathlib.Path(name)
    render_all = functools.partial(
      chat.render,
      template,
      where=where,
      bos=None,
      eos=None,
      special=["<|im_end|>"],
      named=(),
      clock=None,
    )
    with pytest.raises(ValueError) as error:
      sources.render(records, render_all, on_bad_record="raise")
    assert (kind, str(error.value)) == ("prompts", line)
