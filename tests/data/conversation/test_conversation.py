"""The conversations as a source: what it loads, what its checksum says, and who judges."""

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import conversation
from instructjax.data.records import Demonstration, Document, Prompt


def test_load_gives_records(packages):
  assert isinstance(conversation.load("documents", "validation", 0)[0], Document)
  assert isinstance(conversation.load("demonstrations", "train", 0)[0], Demonstration)
  prompts = conversation.load("prompts", "test", 0)
  assert isinstance(prompts[0], Prompt)
  # The report shows the first ten: no seed chooses them.
  assert prompts == conversation.load("prompts", "test", 1)
  with pytest.raises(ValueError, match="kind='rankings' of the conversations"):
    conversation.load("rankings", "train", 0)


def test_checksum_names_the_versions(packages, monkeypatch):
  found = conversation.checksum()
  assert found.startswith("chatterbot-corpus:") and " vaderSentiment:" in found
  monkeypatch.setattr(conversation, "_PACKAGES", ("no-such-package",))
  with pytest.raises(UserError, match=r"no-such-package, which is not installed; run pip install"):
    conversation.checksum()


def test_the_base_judges_fluency(packages):
  asked = []

  def logprob(prompts, responses):
    asked.append((list(prompts), list(responses)))
    return np.array([-2.5, -4.0])

  prompt = conversation.load("prompts", "test", 0)[0].prompt
  judge = conversation.judged_by(logprob)
  first, second = judge.gold_score([prompt, prompt], ["I am so glad.", "I am so glad."])
  assert asked == [([prompt, prompt], ["I am so glad.", "I am so glad."])]
  assert first - second == pytest.approx(1.0)  # fluency 1 and 0
  (ranking,) = judge.collect_rankings([(prompt, ["I am so glad.", "no"])], "heldout", 3)
  assert ranking.labeler.startswith("heldout")
