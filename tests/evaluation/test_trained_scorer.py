"""What is known of a trained scorer, and what it makes of scores."""

import dataclasses
import json

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import labelled, language_model, platt, scorers, trained_scorer
from instructjax.evaluation.labelled import Labelled
from tests.evaluation import small_models

CARD = trained_scorer.Card(
  "toxicity", "Q: {prompt}\nA: {answer}", 2.0, -1.0, 0.5, 0.9, 0.8, 0.7, 70, 20
)


def test_the_card_of_a_reward_model_whose_scores_are_known(monkeypatch):
  """Scores equal to the labels, but for the last test text."""
  texts = [Labelled(f"text {n}", n % 2, str(n)) for n in range(200)]
  test = [one for one in texts if one.part == "test"]
  wrong = test[-1].text

  def scores(model, own):
    return np.array([int(text.split()[1]) % 2 - (text == wrong) * 5.0 for text in own])

  monkeypatch.setattr(trained_scorer, "scores", scores)
  card = trained_scorer.measure(None, texts, 0.5, "evenness", "{prompt}{answer}")
  ones = sum(one.value for one in test)
  assert test[-1].value == 1 or card.auc == 1.0
  if test[-1].value == 1:
    assert card.auc == pytest.approx(1 - 1 / ones)
    assert card.accuracy == pytest.approx(1 - 1 / len(test))
  assert card.majority == pytest.approx(max(ones, len(test) - ones) / len(test))
  assert card.num_test == len(test) and card.num_train == sum(t.part == "train" for t in texts)


def test_labels_that_tell_nothing_are_refused():
  texts = [Labelled(f"text {n}", 0.0, str(n)) for n in range(50)]
  with pytest.raises(UserError, match="part for train"):
    trained_scorer.require_classes(texts, 0.5)
  trained_scorer.require_classes([Labelled("", n % 2, str(n)) for n in range(80)], 0.5)


def test_a_card_that_was_written_is_read(tmp_path):
  trained_scorer.write(CARD, tmp_path)
  assert trained_scorer.read(tmp_path) == CARD
  assert "AUC 0.900, accuracy 0.800 (majority class 0.700) on 20 held-out texts" in CARD.line
  for changes in ({"slope": "x"}, {"pair": "{other}"}, {"more": 1}):
    (tmp_path / trained_scorer.FILE).write_text(json.dumps(dataclasses.asdict(CARD) | changes))
    with pytest.raises(UserError, match="train the scorer anew"):
      trained_scorer.read(tmp_path)


def test_a_scorer_of_a_folder_gives_probabilities(tmp_path, monkeypatch):
  judge = small_models.language_model(tmp_path, head="scalar", max_length=64)
  monkeypatch.setattr(scorers.language_model, "open_reward_model", lambda path, mesh: judge)
  trained_scorer.write(CARD, tmp_path)
  scorer = scorers.load(str(tmp_path))
  assert scorer.auc == 0.9
  items = ["the cat", ("who?", "the cat"), "the sea " * 40]
  texts = ["the cat", "Q: who?\nA: the cat"]
  rewards = language_model.rewards(judge, [(labelled.PROMPTS[0], text) for text in texts])
  found = scorer.score(items)
  assert found[:2] == pytest.approx(platt.probability(rewards, 2.0, -1.0))
  assert 0 <= found[2] <= 1  # the end of a long text
