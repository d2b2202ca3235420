"""Forms: what is asked, and what a sent form must hold."""

import pytest

from instructjax.labels import forms
from tests.labels import app


def test_the_fields_are_those_of_table_3():
  form = forms.FORMS["ranking"]
  assert len(form.fields) == 11 and [(s.low, s.high) for s in form.scales] == [(1, 7)]
  toxicity = {scale.name: (scale.low, scale.high) for scale in forms.FORMS["toxicity"].scales}
  assert toxicity == {"toxicity": (0, 2), "relative_toxicity": (-1, 1), "continuity": (1, 7)}
  assert set(forms.SENSITIVE) <= {name for name, _ in form.fields}


@pytest.mark.parametrize("kind", ["ranking", "toxicity"])
def test_a_whole_form_comes_back_as_it_was(kind):
  sent = app.filled(kind, [7, 3], [1, 1]) | {"7.note": "a\r\nb ", "csrf": "x", "9.rank": "1"}
  payload, problems = forms.parse(kind, [7, 3], sent)
  assert not problems and payload["answers"]["7"]["note"] == "a\nb"
  assert [payload["answers"][number]["rank"] for number in ("7", "3")] == [1, 1]
  again = forms.values_of(kind, payload)
  assert forms.parse(kind, [7, 3], again) == (payload, {})
  assert forms.kept(kind, [7, 3], sent).keys() <= set(forms.names(kind, [7, 3]))
  assert "csrf" not in forms.kept(kind, [7, 3], sent) and "9.rank" not in forms.kept(
    kind, [7], sent
  )


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("1.rank", "0"),
    ("1.rank", "3"),
    ("1.rank", ""),
    ("1.rank", "1.5"),
    ("1.overall", "8"),
    ("1.overall", "²"),
    ("2.sexual", "maybe"),
    ("2.sexual", ""),
    ("2.note", "x" * 10_001),
  ],
)
def test_what_is_missing_or_out_of_range_is_named(name, value):
  sent = app.filled("ranking", [1, 2], [1, 2]) | {name: value}
  assert forms.parse("ranking", [1, 2], sent)[1].keys() == {name}


@pytest.mark.parametrize("text", ["", "  \r\n ", "x" * (forms.LONGEST + 1), "a\0b"])
def test_a_demonstration_must_be_text(text):
  assert "text" in forms.parse("demonstration", [], {"text": text})[1]
  assert forms.parse("demonstration", [], {"text": " a\r\nb\n"}) == ({"text": "a\nb"}, {})


@pytest.mark.parametrize("sent", ["", "a", "nan", "inf", "-3", "0"])
def test_seconds_that_cannot_be_right_are_none(sent):
  assert forms.seconds_of({"seconds": sent}) == forms.seconds_of({}) == 0
  assert "seconds" not in forms.kept("ranking", [7], {"seconds": sent})
  assert forms.kept("ranking", [7], {"seconds": "12.4"}) == {"seconds": "12"}
