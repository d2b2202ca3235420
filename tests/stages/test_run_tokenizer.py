"""The date that a run's chats are made with. That a run keeps its tokenizer and refuses others: test_pipeline.py."""

import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import chat
from instructjax.data import tokenizer as tokenizers
from instructjax.stages import run_tokenizer
from tests.data import test_bpe


def test_the_date_of_chats_is_fixed_by_the_run(tmp_path, monkeypatch):
  """The first run starts before midnight; it is resumed, and another one started, after it."""
  path = tmp_path / "given"
  path.mkdir()
  test_bpe.trained().save(str(path / "tokenizer.json"))
  template = "{{ strftime_now('%A %d') }}: {{ messages[0].content }}"
  given = {"eos_token": test_bpe.END, "chat_template": template}
  (path / "tokenizer_config.json").write_text(json.dumps(given))
  ask = lambda tokenizer: tokenizer.chats.render_one([{"role": "user", "content": "hi"}])
  keep = lambda name: run_tokenizer._keep(tokenizers.load(path), tmp_path / name / "tokenizer")
  monkeypatch.setattr(chat, "now", lambda: "2026-02-28T23:59:00")
  first = keep("first")
  chat._first_now.cache_clear()
  monkeypatch.setattr(chat, "now", lambda: "2026-03-01T00:01:00")
  assert ask(tokenizers.load(path)) == ask(keep("second")) == "Sunday 01: hi"
  assert ask(first) == ask(keep("first")) == "Saturday 28: hi"
  # What `generate` and `export` load.
  assert ask(tokenizers.load(tmp_path / "first" / "tokenizer")) == "Saturday 28: hi"
  (tmp_path / "first" / "tokenizer" / "chat_clock.txt").unlink()
  with pytest.raises(UserError, match="first: the date that its chats were made with is missing"):
    keep("first")
  chat._first_now.cache_clear()
