"""What a reader notices in answers before any score does: repetition, copying and sameness.

Called by stages/measuring.py and by the findings. Pure functions of texts. A word is a run of letters and digits in
any script, in lower case; an apostrophe inside belongs to it.
"""

import itertools
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Words of a run that counts as copied: an answer on the topic shares two with a prompt such as "... about the king."
COPIED_RUN = 3


def words(text: str) -> list[str]:
  """The words of a text."""
  return _WORD.findall(text.lower())


def repeats_pair(answer: str) -> bool:
  """Whether two neighbouring words of the answer stand side by side in it again ("the voice of the voice")."""
  pairs = list(itertools.pairwise(words(answer)))
  return len(set(pairs)) < len(pairs)


def copied(prompt: str, answer: str) -> float:
  """The share of the answer's words that lie in a run of three or more words of the prompt; 0 for an empty answer."""
  asked, said = words(prompt), words(answer)
  runs = {tuple(asked[i : i + COPIED_RUN]) for i in range(len(asked) - COPIED_RUN + 1)}
  taken: set[int] = set()
  for i in range(len(said) - COPIED_RUN + 1):
    if tuple(said[i : i + COPIED_RUN]) in runs:
      taken.update(range(i, i + COPIED_RUN))
  return len(taken) / len(said) if said else 0.0


def distinct(answers: Sequence[str]) -> float:
  """The number of different answers over the number of answers; letter case and marks make no difference."""
  return len({tuple(words(answer)) for answer in answers}) / len(answers) if answers else 0.0
