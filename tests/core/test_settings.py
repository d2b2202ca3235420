"""What is written of settings is read: comments of fields, comments of values, and that none is left out."""

import dataclasses
import io
import pathlib
import textwrap
import tokenize

from instructjax.core import settings
from instructjax.core.config import Config
from instructjax.core.settings import Fact

ROOT = pathlib.Path(__file__).parents[2]
BASE = (ROOT / "configs" / "base.py").read_text()


@dataclasses.dataclass(frozen=True)
class Inner:
  """An inner block.

  More of it.
  """

  rate: float  # how fast [1/s]
  # A long one, which
  # goes on. [tokens]
  length: int = dataclasses.field(metadata={"a": 1})

  def validate(self, where: str):  # not a field's comment
    pass


@dataclasses.dataclass(frozen=True)
class Child(Inner):
  wrapped: (
    int  # inside parentheses
  )  # fmt: skip
  bare: str
  # Not of a field: it stands above a method.

  def other(self): ...


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner
  named: Child  # told here
  seed: int  # a [b] c


def test_facts_of_fields():
  assert settings.field_facts(Inner) == {
    "rate": Fact("how fast", "1/s"),
    "length": Fact("A long one, which goes on.", "tokens"),
  }
  assert settings.field_facts(Child) == settings.field_facts(Inner) | {
    "wrapped": Fact("inside parentheses", ""),
    "bare": Fact("", ""),
  }


def test_facts_of_blocks_come_after_the_fields_beside_them():
  names = [name for name, _ in settings.facts(Outer)]
  inner = ["inner.rate", "inner.length"]
  assert names == [
    "seed", *inner, "named.rate", "named.length", "named.wrapped", "named.bare"
  ]  # fmt: skip
  assert dict(settings.facts(Outer))["seed"] == Fact("a [b] c", "")
  assert dict(settings.blocks(Outer)) == {"inner": "An inner block", "named": "told here"}


def test_sources_of_values():
  source = textwrap.dedent('''
    from somewhere import ConfigDict

    def adam(rate, **changes):
      """Adam."""
      optim = ConfigDict(
        dict(
          rate=rate,
          steps=0,  # C.1: no warmup
          eps=1e-8,  # open
        )
      )
      optim.update(changes)
      return optim

    def base(stage):
      return ConfigDict(
        dict(
          stage=stage,
          size=dict(a=1, b=-1),  # both
          text="# no comment",
          first=adam(9e-6),  # C.2
          second=adam(  # of none
            1e-3,  # its rate
            steps=80,
          ),
        )
      )
  ''')
  assert settings.sources(source, "base") == {
    "stage": "",
    "size.a": "both",
    "size.b": "both",
    "text": "",
    "first.rate": "C.2",
    "first.steps": "C.1: no warmup",
    "first.eps": "open",
    "second.rate": "its rate",
    "second.steps": "",  # changed: the reason for 0 is none for 80
    "second.eps": "open",
  }


def test_every_setting_says_what_it_means():
  assert [name for name, fact in settings.facts(Config) if not fact.meaning] == []
  generated = [name for name, text in settings.blocks(Config) if "Config(" in text or not text]
  assert generated == [], "say what the block is, beside its field in Config or in its docstring"


def test_every_setting_has_a_value_with_a_place_for_its_source():
  assert settings.sources(BASE, "base").keys() == {name for name, _ in settings.facts(Config)}


def test_no_comment_beside_a_value_is_lost():
  """One that stands beside no value would be shown nowhere."""
  trailing = {
    token.string.lstrip("# ")
    for token in tokenize.generate_tokens(io.StringIO(BASE).readline)
    if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
  }
  assert trailing - set(settings.sources(BASE, "base").values()) == set()
