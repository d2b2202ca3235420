"""From a browser's form to what training reads: export, `labels:`, and the reward model's batches."""

import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import batching, sources, tokenize
from instructjax.labels import accounts, exchange, projects, schema, work
from tests.labels import app


class LetterTokenizer:
  """One token a character."""

  eos_id, bos_id, control_pattern, vocab_size = 1, None, None, 256

  def encode(self, text):
    return [ord(letter) for letter in text]


def load(spec, kind="comparisons", split="all"):
  return sources.load(spec, kind, split, seed=0, validation_fraction=0.05, on_bad_record="raise")


@pytest.fixture
def ranked(tmp_path):
  """A project in which ann has ranked the colours: blue and green share rank 1."""
  database = app.make_project(tmp_path / "p", [app.item()])
  ann = app.browser(database, "ann")
  page = ann.get("/next")
  assert page.url.path == "/items/1" and "Name a colour." in page.text
  ids = app.answers_of(database, 1)
  ranks = {"Blue.": 1, "Green, or so.": 1, "No.": 2}
  sent = app.filled("ranking", ids.values(), [ranks[text] for text in ids])
  done = ann.post("/items/1/submit", "/items/1", **sent)
  assert done.url.path == "/work" and "1 of 1 items done" in done.text
  return tmp_path / "p"


def test_what_a_labeler_ranks_is_what_the_reward_model_reads(ranked, tmp_path):
  counts, _ = exchange.export(str(ranked), "comparisons", str(tmp_path / "out"))
  assert list(counts.values()) == [1]
  (name,) = counts
  (from_file,) = load(f"jsonl:{tmp_path}/out/{name}")
  (direct,) = load(f"labels:{ranked}")
  assert direct == from_file and direct.labeler == "ann" and direct.where == "labels:submission 1"
  assert dict(zip(direct.responses, direct.ranks)) == {"Blue.": 1, "Green, or so.": 1, "No.": 2}


def test_the_reward_models_batches_hold_the_tie(ranked):
  (record,) = load(f"labels:{ranked}", split="all")
  tokenizer = LetterTokenizer()
  limits = {"max_prompt_length": 32, "max_response_length": 32}
  rankings = tokenize.tokenize_rankings([record], tokenizer, **limits)
  batches = batching.ranking_batches(
    rankings, max_responses=3, length=64, batch_size=1, seed=0, vocab_size=tokenizer.vocab_size
  )
  batch = next(batches)
  assert sorted(batch.rank_BC[0].tolist()) == [1, 1, 2] and batch.is_answer_BC.all()


def test_until_and_the_checksum_follow_submissions_only(ranked):
  before = sources.how(f"labels:{ranked}")
  database = schema.open_(str(ranked))
  accounts.add(database, "bea", "labeler", None, 0.0)
  assert sources.how(f"labels:{ranked}") == before and sources.files(f"labels:{ranked}") == []
  ann = app.browser(database, "ann")
  ids = app.answers_of(database, 1)
  ann.post("/items/1/submit", "/items/1", **app.filled("ranking", ids.values(), [3, 2, 1]))
  (revised,) = load(f"labels:{ranked}")
  assert sorted(revised.ranks) == [1, 2, 3] and revised.where == "labels:submission 2"
  (first,) = load(f"labels:{ranked}?until=1")
  assert sorted(first.ranks) == [1, 1, 2]
  assert sources.how(f"labels:{ranked}") != before
  assert sources.how(f"labels:{ranked}?until=1") == before


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("labels:{}?until=x", "until='x' of labels: must be the number of a submission"),
    ("labels:{}?cohort=x", "cohort='x' of labels: must be one of training, heldout"),
    ("labels:postgresql://ann:secret@host:port/db", "a source labels:... must be a folder"),
    pytest.param(
      "labels:{}/absent",
      "is no labeling project: it holds no labels.sqlite",
      marks=pytest.mark.sqlite,
    ),
    ("labels:postgresql://ann:secret@host/db", "must not hold a password"),
  ],
)
def test_bad_sources_are_refused(ranked, spec, message):
  with pytest.raises(UserError, match=message) as error:
    load(spec.format(ranked))
  assert "secret" not in str(error.value)


def test_a_project_without_submissions_has_no_records(tmp_path):
  app.make_project(tmp_path, [app.item()])
  with pytest.raises(UserError, match="holds no comparisons yet"):
    exchange.export(str(tmp_path), "comparisons", str(tmp_path / "out"))
  with pytest.raises(UserError, match="holds no records"):
    load(f"labels:{tmp_path}")
  (prompt,) = load(f"labels:{tmp_path}", "prompts")
  assert prompt.prompt == "Name a colour.\n"


def test_what_heldout_labelers_rank_is_kept_from_training(tmp_path):
  """With half of the prompts held out; of zoe's work only that on held-out prompts is written, apart."""
  prompts = [f"Prompt {i}" for i in range(8)]
  database = app.make_project(tmp_path / "p")
  projects.change(database, {"held_out": "0.5"})
  projects.add(database, [app.item(prompt) for prompt in prompts], 0.0)
  number = accounts.add(database, "zoe", "labeler", None, 0.0, cohort="heldout")
  zoe = accounts.User(number, "zoe", "labeler")
  for item in range(1, len(prompts) + 1):  # also those that she would not be given
    work.take(database, zoe, item, 0.0)
  for user in (zoe, app.user(database, "ann")):
    while (item := work.next_item(database, user, 0.0)) is not None:
      app.submit(database, user, item)
  counts, _ = exchange.export(str(tmp_path / "p"), "comparisons", str(tmp_path / "out"))
  rows = {
    name: [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
    for name in counts
  }
  sides = {prompt: projects.split_of(app.item(prompt), 0.5) for prompt in prompts}
  held_out = {prompt for prompt, side in sides.items() if side == "validation"}
  assert 0 < len(held_out) < len(prompts)
  prompts_of = lambda name: {row["prompt"] for row in rows[name]}
  assert prompts_of("train.jsonl") == set(prompts) - held_out
  assert prompts_of("validation.jsonl") == prompts_of("heldout.jsonl") == held_out
  labelers = {name: {row["labeler"] for row in rows[name]} for name in rows}
  assert labelers == {"train.jsonl": {"ann"}, "validation.jsonl": {"ann"}, "heldout.jsonl": {"zoe"}}
  # The same from the database: training never sees what zoe ranks, and ?cohort=heldout is heldout.jsonl.
  spec, heldout = f"labels:{tmp_path}/p", f"labels:{tmp_path}/p?cohort=heldout"
  for split in ("train", "validation"):
    assert load(spec, split=split) == load(f"jsonl:{tmp_path}/out/{split}.jsonl")
  assert {one.labeler for one in load(spec)} == {"ann"} and len(load(spec)) == len(prompts)
  assert load(heldout) == load(f"jsonl:{tmp_path}/out/heldout.jsonl")
  with pytest.raises(UserError, match="holds no records"):
    load(heldout, split="train")
  assert sources.how(spec) != sources.how(heldout)


def test_an_export_leaves_no_file_of_an_earlier_one(ranked, tmp_path):
  (tmp_path / "heldout.jsonl").write_text("{}")
  exchange.export(str(ranked), "comparisons", str(tmp_path))
  assert not (tmp_path / "heldout.jsonl").exists()


def ranking(ranks, prompt="Name a colour.", labeler="ann"):
  responses = ["Blue.", "Green.", "No."][: len(ranks)]
  return {"prompt": prompt, "responses": responses, "ranks": ranks, "labeler": labeler}


@pytest.mark.parametrize("form", ["own", "argilla", "label_studio"])
def test_other_tools_formats_come_back_as_they_were(tmp_path, form):
  rows, left_out = exchange.rows_in(form, [ranking([2, 3, 1])])
  assert not left_out
  exchange.write_lines(tmp_path / "rows.jsonl", rows)
  (found,) = load(f"jsonl:{tmp_path}/rows.jsonl")
  assert dict(zip(found.responses, found.ranks)) == {"Blue.": 2, "Green.": 3, "No.": 1}
  assert (found.prompt, found.labeler) == ("Name a colour.", "ann")


def test_ties_in_other_tools_formats(tmp_path):
  """Argilla's rankings have ties; Label Studio's have none, and say so; pairs leave a tied pair out."""
  tied = ranking([1, 2, 1])
  (row,) = exchange.rows_in("argilla", [tied])[0]
  exchange.write_lines(tmp_path / "rows.jsonl", [row])
  assert load(f"jsonl:{tmp_path}/rows.jsonl")[0].ranks == (1, 2, 1)
  assert exchange.rows_in("label_studio", [tied, ranking([1, 2])]) == (
    [{**exchange.rows_in("label_studio", [ranking([1, 2])])[0][0], "id": 2}],
    1,
  )
  pairs, left_out = exchange.rows_in("hh", [tied, ranking([1, 1])])
  assert (len(pairs), left_out) == (2, 1)
  exchange.write_lines(tmp_path / "pairs.jsonl", pairs)
  found = load(f"hh:{tmp_path}/pairs.jsonl")
  assert {one.responses for one in found} == {(" Blue.", " Green."), (" No.", " Green.")}
  assert {one.labeler for one in found} == {"ann"}


def test_an_unknown_format_is_refused():
  with pytest.raises(UserError, match="--format='x' must be one of own, hh"):
    exchange.rows_in("x", [])
