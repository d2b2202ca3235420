"""Seconds by kind, which do not overlap."""

import jax
import pytest

from instructjax.train import spent


class Clock:
  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(spent.time, "monotonic", lambda: self.now)


def test_kinds_add_up_until_they_are_taken(monkeypatch):
  clock, found = Clock(monkeypatch), spent.Spent()
  for seconds in (0.25, 0.5):
    with found.on("input"):
      clock.now += seconds
  found.add("restore", 3.0)
  found.add("save", 0.0004)
  assert found.take() == {"seconds/input": 0.75, "seconds/restore": 3.0}
  found.add("save", 0.0007)  # with what was too little to tell, 1.1 ms
  assert found.take() == {"seconds/save": 0.0011}
  assert found.take() == {}


def test_compiling_inside_an_evaluation_is_compiling(monkeypatch):
  clock, found = Clock(monkeypatch), spent.Spent()
  with found.on("evaluate"):
    clock.now += 5.0
    found._listen("/jax/core/compile/backend_compile_duration", 3.0)
    found._listen("/jax/core/compile/jaxpr_trace_duration", 1.0)  # a part of what is left
  assert found.take() == {"seconds/compile": 3.0, "seconds/evaluate": 2.0}


def test_jax_says_what_is_compiled():
  with spent.Spent() as found:
    jax.jit(lambda x: x * 7.25 - 0.125)(1.0).block_until_ready()
  told = found.take()
  jax.jit(lambda x: x * 9.25 - 0.125)(1.0).block_until_ready()
  assert told["seconds/compile"] > 0 and found.take() == {}, "it listens no longer"


def test_an_error_inside_is_passed_on():
  with pytest.raises(KeyError), spent.Spent() as found, found.on("input"):
    raise KeyError
