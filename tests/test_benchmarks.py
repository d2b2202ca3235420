"""The benchmarks' commands, as far as they need no library that the tests do without."""

import sys

import pytest

from benchmarks import parity


def test_parity_says_in_one_line_which_extra_it_needs(monkeypatch, capsys):
  for name in ("torch", "transformers"):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  assert parity.main([]) == 2
  printed = capsys.readouterr()
  assert (printed.out, printed.err.count("\n")) == ("", 1)
  assert "torch and transformers must be installed" in printed.err
  assert "instructjax[compare]" in printed.err


@pytest.mark.parametrize(("value", "code"), [(4e-4, 0), (6e-4, 1), (float("nan"), 1)])
def test_a_broken_bound_is_marked_and_ends_the_command_with_1(monkeypatch, capsys, value, code):
  monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(parity, "cases", lambda gguf, texts: [("one", {"left": value, "greedy": 0})])
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets it
  assert parity.main([]) == code
  printed = capsys.readouterr().out
  assert ("!" in printed) == bool(code)
  assert ('"broken": ["one: left"]' in printed) == bool(code)


def test_text_without_a_tokenizer_is_refused(capsys):
  with pytest.raises(SystemExit):
    parity.main(["--text", __file__])
  assert "--text needs --gguf" in capsys.readouterr().err
