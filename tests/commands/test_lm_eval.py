"""The harness's command: which extra it needs, and that its flags reach it."""

import sys
import types

import pytest

from instructjax.commands import lm_eval
from instructjax.core.errors import UserError


def test_it_says_which_extra_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(UserError, match=r"instructjax\[eval\]"):
    lm_eval.main([])


def test_flags_are_those_of_the_harness(monkeypatch):
  seen = []
  harness = types.ModuleType("lm_eval.__main__")
  harness.cli_evaluate = lambda: seen.append(sys.argv[1:])
  monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
  monkeypatch.setitem(sys.modules, "lm_eval.__main__", harness)
  name = "instructjax.evaluation.harness"
  monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setattr(sys, "argv", [])
  lm_eval.main(["run", "--model", "instructjax"])
  assert seen == [["run", "--model", "instructjax"]]
