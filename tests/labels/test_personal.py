"""What looks like personal data is taken out of a text."""

import sys

import pytest

from instructjax.core.errors import UserError
from instructjax.labels import personal


def test_parts_that_overlap_are_one():
  text = "to jo@example.org, now"
  found = [(3, 17, "EMAIL"), (6, 17, "LINK"), (19, 22, "NUMBER")]
  assert personal.replaced(text, found) == "to [EMAIL], [NUMBER]"
  assert personal.replaced(text, [(3, 5, "NUMBER"), (4, 17, "LINK")]) == "to [LINK], now"
  assert personal.replaced(text, []) == text


def test_without_the_extra_the_message_names_it(monkeypatch):
  personal._recognizers.cache_clear()
  monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
  with pytest.raises(
    UserError, match=r"presidio_analyzer is missing: pip install 'instructjax\[privacy\]'"
  ):
    personal.require()


@pytest.mark.parametrize(
  ("text", "stripped"),
  [
    ("Mail jo.doe@example.co.uk!", "Mail [EMAIL]!"),
    ("Call +44 20 7946 0958 today", "Call [PHONE] today"),
    ("card 4111 1111 1111 1111.", "card [CARD]."),
    ("to GB33BUKB20201555555555", "to [ACCOUNT]"),
    ("see https://x.org/me?u=1 now", "see [LINK] now"),
    ("from 192.168.1.4", "from [ADDRESS]"),
    (
      "Write 3 lines about 2024, e.g. 1,000,000 stars.",
      "Write 3 lines about 2024, e.g. 1,000,000 stars.",
    ),
  ],
)
def test_patterns(text, stripped):
  pytest.importorskip("presidio_analyzer", reason="the extra privacy is large")
  assert personal.strip(text) == stripped
