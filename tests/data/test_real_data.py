"""Published files as they are."""

import itertools

import pytest

from instructjax.data import sources
from instructjax.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.real_data


def load(spec, kind, on_bad_record="raise", split="all"):
  return sources.load(
    spec, kind, split, seed=0, validation_fraction=0.1, on_bad_record=on_bad_record
  )


def test_qa_feedback_has_four_answers_ranked_with_ties(real_data_dir):
  rankings = load(f"jsonl:{real_data_dir}/qa_feedback/rank4.dev.jsonl.gz", "comparisons")
  assert len(rankings) == 362
  assert {len(ranking.responses) for ranking in rankings} == {4}
  pairs = [pair for r in rankings for pair in itertools.combinations(r.ranks, 2)]
  # 290 of 2172 pairs were judged ties; 17 prompts hold ties that no ranking can.
  assert len(pairs) == 2172
  assert abs(sum(a == b for a, b in pairs) - 290) <= 17 * 3


@pytest.mark.parametrize(
  ("name", "num_rows", "num_demonstrations"), [("harmless", 1706, 1702), ("helpful", 1776, 1776)]
)
def test_hh_rlhf_serves_three_kinds(real_data_dir, caplog, name, num_rows, num_demonstrations):
  spec = f"hh:{real_data_dir}/hh_rlhf/{name}_base_test.dev.jsonl.gz"
  assert len(load(spec, "prompts")) == num_rows
  rankings = load(spec, "comparisons")
  assert len(rankings) == num_rows
  assert sum(not text.strip() for ranking in rankings for text in ranking.responses) == 4
  assert len(load(spec, "demonstrations", "skip")) == num_demonstrations
  if num_demonstrations < num_rows:  # an answer may be ranked though it is empty, not imitated
    assert f"skipped 4 of {num_rows} records" in caplog.text
    with pytest.raises(ValueError, match=r"jsonl.gz:\d+: 'response' is empty"):
      load(spec, "demonstrations")
  assert all(ranking.prompt.endswith("\n\nAssistant:") for ranking in rankings)


def test_classic_books_split_and_survive_the_tokenizer(real_data_dir, tmp_path):
  spec = f"jsonl:{real_data_dir}/classic_books/books.dev.jsonl.gz"
  books = load(spec, "documents")
  assert len(books) == 56
  train, validation = (load(spec, "documents", split=split) for split in ("train", "validation"))
  assert len(train) + len(validation) == 56 and validation
  text = books[0].text[:200_000]
  tokenizer = train_tokenizer([text], 2000, tmp_path / "a.model", seed=0)
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert len(ids) < 1.7 * len(text.split())
