import contextlib
import gzip
import hashlib
import json
import logging
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from instructjax.core.errors import UserError
from instructjax.data import dialogues, sources
from instructjax.data.records import (
  KINDS,
  BadRecord,
  Chat,
  Demonstration,
  Document,
  Prompt,
  Ranking,
  parse_record,
)
from tests.fuzz import data_files, mutants


def load(spec, kind, split="train", *, fraction=1e-9, on_bad_record="raise", seed=0):
  """The whole of a source by default: the held-out fraction is next to nothing."""
  return sources.load(
    str(spec), kind, split, seed=seed, validation_fraction=fraction, on_bad_record=on_bad_record
  )


def write(path, *lines):
  """Writes lines, dicts as JSON and bytes as they are; returns the path."""
  raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  path.write_bytes(b"".join(line + b"\n" for line in raw))
  return path


def test_bad_lines_can_be_skipped_and_are_counted_and_listed(tmp_path, caplog):
  rows = [{"text": "a"}] + [{"text": ""}, {"txet": "SLUR"}] * 4 + [{"text": ""}, {"text": "b"}]
  path = write(tmp_path / "a.jsonl", *rows)
  with caplog.at_level(logging.WARNING):
    records = load(f"jsonl:{path}", "documents", on_bad_record="skip")
  assert records == [Document("a"), Document("b")]
  # One line, with the number of each reason and the first place, the commonest first.
  (line,) = caplog.messages
  assert (
    f"skipped 9 of 11 records: {path}:2: 'text' is empty (and 4 more); {path}:3: 'text'" in line
  )
  assert line.endswith("(and 3 more)") and f"{path}:4" not in line
  assert "SLUR" not in caplog.text


def test_a_file_without_records_is_refused(tmp_path):
  with pytest.raises(ValueError, match="data.documents='jsonl:.*' holds no records$"):
    load(f"jsonl:{write(tmp_path / 'a.jsonl', b'')}", "documents")
  path = write(tmp_path / "b.jsonl", {"text": ""})
  with pytest.raises(ValueError, match=f"holds no records but 1 bad ones: {path}:1: 'text' is emp"):
    load(f"jsonl:{path}", "documents", on_bad_record="skip")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      dict(spec="csv:a"),
      "data.prompts='csv:a' must start with one of demo:, conversation:, jsonl:, hh:, parquet:, datas",
    ),
    (dict(spec="a.jsonl"), "data.prompts='a.jsonl' must start with one of demo:"),
    (dict(kind="ranks"), "kind='ranks' must be one of documents, prompts"),
    (dict(split="dev"), "split='dev' must be train, validation, test or all"),
    (dict(on_bad_record="ignore"), "on_bad_record='ignore' must be raise or skip"),
  ],
)
def test_bad_arguments_name_the_good_ones(arguments, message):
  with pytest.raises(ValueError, match=message) as raised:
    load(**{"spec": "jsonl:a", "kind": "prompts", **arguments})
  # The user writes the spec. The other arguments are a programmer's.
  assert type(raised.value) is (UserError if "spec" in arguments else ValueError)


@pytest.mark.parametrize("rest", ["?text={}", "?{}=a", "?format={}", "?text=text&{}"])
def test_messages_quote_a_part_of_a_long_source(tmp_path, rest):
  path = write(tmp_path / "a.jsonl", {"prompt": "p"})
  for spec in (f"jsonl:{path}{rest}", f"csv:{rest}"):
    with pytest.raises(UserError) as raised:
      load(spec.format("x" * 3000), "documents")
    assert len(str(raised.value)) < 1200 and "x" * 40 in str(raised.value)


# The held-out split.


def test_splits_are_disjoint_complete_and_the_size_asked_for(tmp_path):
  rows = [{"prompt": f"p{i}", "response": "r"} for i in range(2000)]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  train, validation, everything = (
    load(spec, "demonstrations", split, fraction=0.1) for split in ("train", "validation", "all")
  )
  assert set(train) | set(validation) == set(everything) and len(everything) == 2000
  assert not set(train) & set(validation)
  assert 160 < len(validation) < 240


def test_all_records_of_a_prompt_fall_on_one_side_whatever_the_order_kind_and_seed(tmp_path):
  rows = [
    {"prompt": f"p{i % 40}", "response": f"r{i}", "responses": [f"r{i}", "b"], "ranks": [1, 1]}
    for i in range(200)
  ]
  forward = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  backward = f"jsonl:{write(tmp_path / 'b.jsonl', *rows[::-1])}"
  held_out = [
    {record.prompt for record in load(spec, kind, "validation", fraction=0.3, seed=seed)}
    for seed, spec in enumerate((forward, backward))
    for kind in ("prompts", "demonstrations", "comparisons")
  ]
  assert all(prompts == held_out[0] for prompts in held_out)
  assert 0 < len(held_out[0]) < 40
  train = {record.prompt for record in load(forward, "demonstrations", fraction=0.3)}
  assert not train & held_out[0]
  # A larger fraction holds out more, not others.
  assert held_out[0] < {r.prompt for r in load(forward, "prompts", "validation", fraction=0.6)}


def test_an_empty_split_is_refused(tmp_path):
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', {'text': 'a'})}"
  with pytest.raises(ValueError, match="none of its 1 records fall in the validation split with"):
    load(spec, "documents", "validation")


def test_records_of_one_prompt_cannot_be_split(tmp_path):
  rows = [{"prompt": "p", "response": f"r{i}"} for i in range(9)]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  message = r"none of its 9 records \(they have 1 different prompt\) fall in the validation split"
  with pytest.raises(UserError, match=message):
    load(spec, "demonstrations", "validation")


def test_records_know_their_places_which_are_no_part_of_them(tmp_path):
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', b'', {'prompt': 'p', 'response': 'r'})}"
  (record,) = load(spec, "demonstrations")
  assert record.where == f"{tmp_path}/a.jsonl:2"
  assert record == Demonstration("p", "r") and hash(record) == hash(Demonstration("p", "r"))
  assert "jsonl" not in repr(record)


def test_a_chat_that_a_template_refuses_is_named_by_its_place(tmp_path):
  template = lambda chats: [UserError("no") for _ in chats]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', {'prompt': ASKED})}"
  with pytest.raises(UserError, match=f"^data.prompts: {tmp_path}/a.jsonl:1: chat prompt 1 cannot"):
    sources.render(load(spec, "prompts"), template, on_bad_record="raise")


@pytest.mark.parametrize("seed", range(150))
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, seed):
  """A few of the cases of tests/fuzz/data_files.py, which a command tries by the thousand."""
  mutants.write(tmp_path, next(data_files.cases(random.Random(seed)))[1])
  with contextlib.suppress(UserError):
    data_files.run(tmp_path)


# Chat prompts.

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hé?"}]
ANSWER = {"role": "assistant", "content": "ho"}
WORSE = {"role": "assistant", "content": "no"}


def test_render_makes_every_chat_prompt_text_and_keeps_the_rest(tmp_path):
  def template(chats):
    return ["".join(f"<{m['role']}>{m['content']}" for m in chat) + "<assistant>" for chat in chats]

  rows = [
    {"messages": [*ASKED, ANSWER], "prompt": ASKED, "chosen": "ho", "rejected": "no"},
    {"prompt": "plain", "response": "r", "chosen": "a", "rejected": "b"},
  ]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  text = "<system>Be kind.<user>Hé?<assistant>"
  rendered = [
    sources.render(load(spec, kind), template, on_bad_record="raise") for kind in KINDS[1:]
  ]
  assert rendered == [
    [Prompt(text), Prompt("plain")],
    [Demonstration(text, "ho"), Demonstration("plain", "r")],
    [Ranking(text, ("ho", "no"), (1, 2)), Ranking("plain", ("a", "b"), (1, 2))],
  ]


@pytest.mark.parametrize("record", [Document("t"), Prompt("p"), Ranking("p", ("a", "b"), (1, 2))])
def test_render_asks_for_no_template_where_there_is_no_chat(record):
  records = [record]
  assert sources.render(records, None, on_bad_record="raise") is records


def test_a_template_that_refuses_is_named_with_the_kind_and_the_prompt(caplog):
  def template(chats):
    refused = UserError("t.json: the chat template fails: no system")
    return [refused if chat[0]["role"] == "system" else "text" for chat in chats]

  good, bad = (Prompt(Chat(((role, "SLUR"),))) for role in ("user", "system"))
  message = "data.prompts: {}chat prompt {} cannot be made text: t.json: the chat template fails"
  with pytest.raises(ValueError, match="^" + message.format("", 3)) as error:
    sources.render([Prompt("plain"), good, bad], template, on_bad_record="raise")
  assert "SLUR" not in str(error.value)
  with caplog.at_level(logging.WARNING):
    kept = sources.render([Prompt("plain"), good, bad], template, on_bad_record="skip")
  assert kept == [Prompt("plain"), Prompt("text")]
  assert message.format("skipped 1 of 3 records: ", 3) in caplog.text
  with pytest.raises(ValueError, match=message.format("no record is left: ", 1)):
    sources.render([bad], template, on_bad_record="skip")


def test_a_chat_is_held_out_by_its_messages_whatever_the_kind(tmp_path):
  def row(i):
    asked = [*ASKED, {"role": "user", "content": f"q{i % 40}"}]
    pair = {"chosen": [*asked, ANSWER], "rejected": [*asked, WORSE]}
    return {"messages": [*asked, ANSWER], **pair}

  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *map(row, range(80)))}"
  held_out = [
    {record.prompt for record in load(spec, kind, "validation", fraction=0.3)} for kind in KINDS[1:]
  ]
  assert held_out[0] == held_out[1] == held_out[2] and 0 < len(held_out[0]) < 40
  # SHA-256 of the UTF-8 bytes of [["system","Be kind."],["user","Hé?"],["user","q0"]].
  digest = hashlib.sha256(
    b'[["system","Be kind."],["user","H\xc3\xa9?"],["user","q0"]]'
  ).hexdigest()
  chat = Chat((("system", "Be kind."), ("user", "Hé?"), ("user", "q0")))
  assert (chat in held_out[0]) == (int(digest[:16], 16) / 16**16 < 0.3)


def test_simulated_labelers_are_refused_for_other_records():
  with pytest.raises(UserError, match="only the records of 'demo:' and 'conv.* are 'jsonl:mine'"):
    sources.require_simulation("jsonl:mine")
  assert sources.require_simulation("demo:") is sources.simulation("demo:")
  assert not sources.simulation("demo:").READS_BASE
  assert sources.simulation("conversation:").READS_BASE
  assert sources.simulation("") is sources.simulation("jsonl:demo:") is None


# Properties: what is written is what is read.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
FULL = TEXT.filter(str.strip)
ANSWERS = st.lists(TEXT, min_size=2, max_size=4)
QUICK = settings(
  max_examples=60,
  deadline=None,
  database=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def rankings(draw):
  responses = draw(ANSWERS)
  ranks = draw(
    st.lists(st.integers(1, 2**31 - 1), min_size=len(responses), max_size=len(responses))
  )
  return {"prompt": draw(FULL), "responses": responses, "ranks": ranks, "labeler": draw(TEXT)}


@QUICK
@given(
  rows=st.lists(rankings(), min_size=1, max_size=5),
  form=st.sampled_from(["lines", "array", "printed", "gzip", "parquet", "crlf"]),
  ascii_only=st.booleans(),
)
def test_any_rankings_are_read_as_they_were_written(tmp_path, rows, form, ascii_only):
  lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
  text = {
    "array": "[" + ", ".join(lines) + "]",
    "printed": json.dumps(rows, indent=2, ensure_ascii=ascii_only),
    "crlf": "\r\n".join(lines),
  }.get(form, "\n".join(lines))
  path = tmp_path / "rows"
  path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
  if form == "parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  found = load(f"{'parquet' if form == 'parquet' else 'jsonl'}:{path}", "comparisons")
  assert found == [
    Ranking(row["prompt"], tuple(row["responses"]), tuple(row["ranks"]), row["labeler"])
    for row in rows
  ]


@QUICK
@given(
  scores=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(), min_size=2)
)
def test_ranks_of_scores_are_their_order(scores):
  row = {"prompt": "p", "responses": ["a"] * len(scores), "scores": scores}
  ranks = parse_record("comparisons", row, "a:1").ranks
  for one, rank in zip(scores, ranks, strict=True):
    assert rank == 1 + sum(other > one for other in scores)


@QUICK
@given(
  turns=st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6), texts=st.data()
)
def test_a_demonstration_is_a_users_turn_and_the_answer_to_it(turns, texts):
  chat = [{"role": role, "content": texts.draw(FULL)} for role in turns]
  if turns[-2:] == ["user", "assistant"]:
    found = parse_record("demonstrations", {"messages": chat}, "a:1")
    assert found.response == chat[-1]["content"]
    assert [text for _, text in found.prompt.messages] == [m["content"] for m in chat[:-1]]
  else:
    with pytest.raises(BadRecord):
      parse_record("demonstrations", {"messages": chat}, "a:1")


@QUICK
@given(human=FULL, answer=FULL, after=FULL)
def test_no_dialogue_teaches_to_speak_as_the_human(human, answer, after):
  assume("Human:" not in answer)  # which is refused too, and has a test of its own
  asked = f"\n\nHuman: {human}\n\nAssistant:"
  row = {"chosen": f"{asked} {answer}\n\nHuman: {after}", "rejected": f"{asked} b"}
  with pytest.raises(BadRecord):
    dialogues.convert(row, "demonstrations", "a:1")
  row["chosen"] = f"{asked} {answer}"
  plain = lambda text: text.replace("\r\n", "\n").replace("\r", "\n")
  found = dialogues.convert(row, "demonstrations", "a:1")
  assert found == {"prompt": plain(asked), "response": plain(f" {answer}")}
