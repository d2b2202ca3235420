"""The models of the labeling application: seeds, chats in the tokenizer's template, and the playground's model."""

import dataclasses
import types

import pytest

from instructjax.commands import label_models
from instructjax.core.errors import UserError
from instructjax.data.records import Chat, Prompt
from instructjax.evaluation import language_model

HOW = label_models.Sampling(temperature=0.5, max_new_tokens=7, seed=4)


@pytest.fixture
def asked(monkeypatch):
  """The requests that models are given; each answers with its name."""
  found = []

  def generate(model, requests):
    found.extend(requests)
    return [f" {model.name} " for _ in requests]

  render = lambda messages: "|".join(f"{one['role']}:{one['content']}" for one in messages)
  tokenizer = types.SimpleNamespace(
    chats=types.SimpleNamespace(render_one=render, has_template=False)
  )
  chat = types.SimpleNamespace(chats=types.SimpleNamespace(render_one=render, has_template=True))
  fake = lambda name, mesh: types.SimpleNamespace(
    name=name, tokenizer=chat if name == "chat" else tokenizer
  )
  monkeypatch.setattr(language_model, "open_model", fake)
  monkeypatch.setattr(language_model, "generate", generate)
  return found


def test_answers(asked):
  prompts = [Prompt("plain"), Prompt(Chat((("user", "hi"),)))]
  found = label_models.answers(prompts, 1, ["m", "n"], 3, HOW)
  assert found == [(("m", "m"), ("m", "m"), ("n", "n"))] * 2
  assert [one.prompt for one in asked if one.seed == 4] == ["plain", "user:hi"]
  assert {one.seed for one in asked} == {4, 5, 6}
  assert {(one.temperature, one.max_new_tokens) for one in asked} == {(0.5, 7)}


def test_a_text_is_a_message_where_there_is_a_template(asked):
  prompts = [Prompt("plain"), Prompt(Chat((("user", "hi"),)))]
  read = lambda name, chat: (
    asked.clear()
    or label_models.answers(prompts, 1, [name], 1, dataclasses.replace(HOW, chat=chat))
    and [one.prompt for one in asked]
  )
  assert read("chat", None) == read("chat", True) == ["user:plain", "user:hi"]
  assert read("chat", False) == ["plain", "user:hi"]
  assert read("m", None) == read("m", False) == ["plain", "user:hi"]
  with pytest.raises(UserError, match="--chat needs a chat template, and the tokenizer of m has"):
    read("m", True)


def test_the_playgrounds_model_answers_anew_each_time(asked):
  answer = label_models.answerer(["m"], HOW)
  assert len(asked) == 1  # its first programs are compiled before anybody waits
  assert answer("p") == "m" and answer("p") == "m"
  assert [(one.prompt, one.seed) for one in asked[1:]] == [("p", 5), ("p", 6)]
  label_models.answerer(["chat"], HOW)("hi")
  assert asked[-1].prompt == "user:hi"
  for names in ([], ["m", "n"]):
    with pytest.raises(UserError, match=f"needs one --checkpoint.*got {len(names)}"):
      label_models.answerer(names, HOW)
