"""Scorers by their spec."""

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import scorers


def shouting(items):
  return [sum(map(str.isupper, item)) for item in items]


def test_a_function_of_the_user_is_a_scorer():
  one = scorers.load(f"python:{__name__}:shouting")
  assert one.score(["Ab", "ABc"]) == [1.0, 2.0]
  assert one.auc is None


@pytest.mark.parametrize("spec", ["nothing", "python:tests.missing:f", "python:json:missing"])
def test_what_is_no_scorer_is_refused(spec):
  with pytest.raises(UserError, match="scorer"):
    scorers.load(spec)
