"""What a tokenizer.json may not hold: found before the package reads it."""

import json
import time
import tracemalloc

import pytest

from instructjax.core.errors import UserError
from instructjax.data import vocabulary_file

ADDED = {"id": 2, "content": "<e>", "special": True}
BPE = {
  "added_tokens": [ADDED],
  "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<e>": 2}, "merges": []},
}


def model(**changes):
  return BPE | {"model": BPE["model"] | changes}


def read(tmp_path, content):
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  return vocabulary_file.read(tmp_path / "tokenizer.json")


def post(**rule):
  return BPE | {"post_processor": {"type": "Sequence", "processors": [rule]}}


def replace(*contents):
  rules = [{"type": "Replace", "pattern": {"String": "a"}, "content": text} for text in contents]
  return BPE | {"normalizer": {"type": "Sequence", "normalizers": rules}}


UNIGRAM = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1]], "unk_id": 0}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (5, "must be a JSON object, and it is 5"),
    ({}, "model must hold a JSON object, got None"),
    (model(vocab=None), "model.vocab must hold a JSON object, got None"),
    (model(type="Char"), "model.type='Char' must be one of BPE, Unigram, WordLevel, WordPiece"),
    (model(vocab={"a": 2**31}), r"model.vocab\['a'\] must be a token's id, .* got 2147483648"),
    (model(vocab={"a": -1}), r"model.vocab\['a'\] must be a token's id, .* got -1"),
    (model(vocab={"a": 0.0}), r"must be a token's id, .* got 0.0"),
    (model(vocab={"a": True}), r"must be a token's id, .* got True"),
    (model(vocab={"a": 0, "b": 0}), "tokens 'a' and 'b' both have the id 0"),
    (model(dropout=0.1), "model.dropout=0.1 must be null"),
    (model(**UNIGRAM | {"vocab": [["a", 0.0], ["a", 0.0]]}), "'a' has two ids, 0 and 1"),
    (model(**UNIGRAM | {"vocab": [["a"]]}), r"model.vocab\[0\] must be a text and a number"),
    (model(**UNIGRAM | {"vocab": [["a", float("inf")]]}), r"model.vocab\[0\] must be a text and"),
    (model(**UNIGRAM | {"unk_id": 2}), "model.unk_id=2 must be one of its 2 tokens"),
    (BPE | {"added_tokens": None}, "added_tokens must be a list, got None"),
    (BPE | {"added_tokens": ["<e>"]}, r"added_tokens\[0\] must hold a JSON object, got '<e>'"),
    (BPE | {"added_tokens": [ADDED | {"content": ""}]}, "content must be a text, got ''"),
    (BPE | {"added_tokens": [ADDED, ADDED]}, "the added token '<e>' is there twice"),
    (BPE | {"added_tokens": [ADDED | {"id": 3}]}, "token '<e>' has two ids, 2 and 3"),
    (BPE | {"added_tokens": [ADDED | {"content": "<f>"}]}, "'<e>' and '<f>' both have the id 2"),
    (BPE | {"added_tokens": [ADDED | {"id": 2**31}]}, r"added_tokens\[0\]: id must be a token's id"),
    (post(special_tokens={"<s>": {"ids": [2**31]}}), "names the id 2147483648, which no token has"),
    (post(sep=["<e>", 7], cls=["a", 0]), "post_processor names the id 7, which no token has"),
    (replace(*["aaaaaaaaaa"] * 20), "normalizer makes text more than 1000 times as long"),
  ],
)  # fmt: skip
def test_what_is_refused(tmp_path, content, message):
  with pytest.raises(UserError, match=f"tokenizer.json' is not a tokenizer.json: .*{message}"):
    read(tmp_path, content)


def test_what_is_read(tmp_path):
  text, content = read(tmp_path, BPE | {"padding": {"strategy": {"Fixed": 10**12}}})
  assert json.loads(text) == content == BPE | {"padding": None, "truncation": None}
  text, _ = read(tmp_path, model(**UNIGRAM))
  assert text == (tmp_path / "tokenizer.json").read_text()
  read(tmp_path, replace("bb", "b" * 400))
  read(tmp_path, post(type="BertProcessing", sep=["<e>", 2], cls=["a", 0]))


def test_an_id_of_2_to_the_31_takes_neither_time_nor_memory(tmp_path):
  start, content = time.perf_counter(), model(vocab={"a": 2**31 - 1})
  tracemalloc.start()
  with pytest.raises(UserError, match="got 2147483647"):
    read(tmp_path, content)
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()
  assert time.perf_counter() - start < 5
