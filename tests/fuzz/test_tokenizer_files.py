"""A few damaged tokenizer folders of the many that the fuzz command tries."""

import itertools
import random

from instructjax.core.errors import UserError
from tests.fuzz import tokenizer_files


def test_damaged_folders_are_read_or_refused_in_a_line(tmp_path):
  refused = 0
  cases = tokenizer_files.cases(random.Random(0))
  for number, (name, files) in enumerate(itertools.islice(cases, 80)):
    folder = tmp_path / str(number)
    folder.mkdir()
    for file, content in files.items():
      (folder / file).write_bytes(content)
    try:
      tokenizer_files.target(folder)
    except UserError as error:
      message = str(error).replace(str(folder), "")
      assert message.isprintable() and len(message) < 400, name
      refused += 1
  assert 20 < refused < 75  # both happen
