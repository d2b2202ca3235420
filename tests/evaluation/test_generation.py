"""Answers after a cached past, for families whose layers differ, and what ends them."""

import types

import pytest

from instructjax.core.config import MeshConfig
from instructjax.evaluation import generation, language_model, planning
from instructjax.evaluation.language_model import Request
from instructjax.parallel import sharding
from tests import tiny
from tests.evaluation import small_models
from tests.evaluation.test_language_model import greedy

SHOTS = "who sat? the cat.\nwho looked? the cat.\n"
PROMPTS = [SHOTS + question for question in ("who is sand?", "what is the hill?", "who?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("model")


@pytest.fixture
def with_past(monkeypatch):
  monkeypatch.setattr(planning, "ROW", 4)
  monkeypatch.setattr(planning, "SAVED", 4)
  monkeypatch.setattr(planning, "CACHED", 4)
  monkeypatch.setattr(generation, "_LEAST", 2)
  monkeypatch.setattr(generation, "_STEPS", 5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_answers_after_a_past(folder, with_past, family):
  networks = {"gpt2": tiny.GPT2} | tiny.FAMILIES
  one = small_models.language_model(folder, networks[family], max_length=64)
  answers = language_model.generate(one, [Request(prompt, (), 12) for prompt in PROMPTS])
  assert answers == [one.tokenizer.decode(greedy(one, prompt, 12)) for prompt in PROMPTS]


def test_answers_on_a_mesh(folder, with_past):
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=2, tensor=2))
  requests = [Request(prompt, (), 12, 1.0, 7) for prompt in PROMPTS]
  spread = language_model.generate(
    small_models.language_model(folder, mesh=mesh, max_length=64), requests
  )
  assert spread == language_model.generate(
    small_models.language_model(folder, max_length=64), requests
  )


def test_stop_texts_may_hold_control_tokens():
  """They are not in the decoded text, so they are looked for in the tokens."""
  spelled = {"<|end|>": [7], "<|start|>user": [8, 3], "\n": [5], "": []}
  tokenizer = types.SimpleNamespace(
    encode_prompt=spelled.__getitem__,
    chats=types.SimpleNamespace(control_texts={7: "<|end|>", 8: "<|start|>"}),
  )
  stops = generation.control_stops(tokenizer, ("\n", "<|end|>", "", "<|start|>user"))
  assert stops == [[7], [8, 3]]
  assert generation.cut_ids([1, 8, 2, 8, 3, 7], stops) == [1, 8, 2]
  assert generation.cut_ids([1, 7, 8, 3], stops) == [1]
  assert generation.cut_ids([1, 2, 8], stops) == [1, 2, 8]
  assert generation.cut_ids([1, 2], []) == [1, 2]


def test_the_first_of_several_stop_texts_counts():
  assert generation.cut("ab\n\ncd", ("\n\n", "c", "")) == "ab"
  assert generation.cut("ab", ("\n",)) == "ab"
