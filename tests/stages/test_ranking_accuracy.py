"""The reward model's accuracy on rankings, its error and its calibration, worked out by hand."""

import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.data.records import Ranking
from instructjax.data.tokenize import RankingTokens
from instructjax.stages import answers, ranking_accuracy
from tests import micro


def judged(*rankings) -> results.Judgement:
  """`judge` of rankings (prompt, scores, ranks), whose scores are given in place of a model's."""
  items = [RankingTokens([p], [[0]] * len(ranks), ranks, None) for p, _, ranks in rankings]
  scores = [np.array(score, np.float32) for _, score, _ in rankings]
  with (
    mock.patch.object(ranking_accuracy, "tokenized", lambda ctx, records: items),
    mock.patch.object(ranking_accuracy, "score_rankings", lambda ctx, params, found: scores),
  ):
    return ranking_accuracy.judge(None, None, list(rankings))


def test_accuracy_is_the_share_of_pairs_whose_better_ranked_answer_scores_higher():
  """Rank 1 is the best. Of the pairs of 3, 1, 2 ranked 1, 2, 3 two are right; equal scores are no win."""
  found = judged((1, [3, 1, 2], [1, 2, 3]), (2, [0, 0], [1, 2]), (3, [5, 6], [2, 1]))
  assert found.pairs == 5 and found.prompts == 3
  assert found.accuracy == pytest.approx(3 / 5)
  assert found.score_std == pytest.approx(np.std([3, 1, 2, 0, 0, 5, 6]))
  # Of the preferred answer's score less the other's: 3 - 1, 3 - 2, 1 - 2, 0 - 0, 6 - 5. At a difference of 1, which
  # is sure to .731, two of three are right; at 2, sure to .881, the one; equal scores are half right.
  calibration = found.calibration
  assert calibration.count == (1, 0, 0, 0, 3, 0, 0, 1, 0, 0)
  right, sure = (np.array(x)[[0, 4, 7]] for x in (calibration.accuracy, calibration.confidence))
  np.testing.assert_allclose(right, [0.5, 2 / 3, 1])
  np.testing.assert_allclose(sure, [0.5, 0.731059, 0.880797], rtol=1e-5)


def test_ties_are_no_pairs():
  found = judged((1, [3, 1, 2], [1, 1, 2]), (2, [0, 1], [1, 1]))
  # 3 > 2 is right, 1 > 2 is not, and 3 beside 1 is a tie.
  assert (found.pairs, found.accuracy, found.prompts) == (2, 0.5, 2)
  with pytest.raises(UserError, match="2 held-out rankings hold no pair that is not a tie"):
    judged((1, [3, 1], [1, 1]), (2, [0, 1], [2, 2]))


def test_the_standard_error_is_over_prompts():
  """Right of total per prompt: 3 of 3, 0 of 1 and, in two rankings of one prompt, 1 of 2.

  Accuracy 4/6. By the delta method sqrt(sum of (right - 2/3 total)^2) / 6, with differences 1, -2/3 and -1/3; over
  six independent pairs it would be sqrt(2/3 * 1/3 / 6) = .192.
  """
  found = judged(
    (1, [3, 2, 1], [1, 2, 3]), (2, [0, 1], [1, 2]), (3, [1, 0], [1, 2]), (3, [0, 1], [1, 2])
  )
  assert found.accuracy == pytest.approx(4 / 6) and found.prompts == 3
  assert found.accuracy_stderr == pytest.approx(np.sqrt(1 + 4 / 9 + 1 / 9) / 6)


def test_pair_margins_hand_worked():
  # Ranks 2, 1, 2: the second is preferred to the first and to the third, which are tied.
  np.testing.assert_array_equal(
    ranking_accuracy.pair_margins(np.array([0.5, 2.0, 3.0]), [2, 1, 2]), [1.5, -1.0]
  )


def test_rankings_are_scored_in_their_order():
  rankings = [
    RankingTokens([1, 2], [[3], [4, 5], [6]], [1, 2, 3], None),
    RankingTokens([7], [[8], [9]], [1, 1], None),
  ]

  def score_tokens(ctx, model, params, sequences):
    assert (ctx.name, model, params) == ("run", "reward", "params")
    assert sequences == [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6], [7, 8], [7, 9]]
    return np.arange(5.0)

  ctx = types.SimpleNamespace(name="run", model=lambda role: role)
  with mock.patch.object(answers, "score_tokens", score_tokens):
    found = ranking_accuracy.score_rankings(ctx, "params", rankings)
  assert [score.tolist() for score in found] == [[0, 1, 2], [3, 4]]


def test_rankings_with_too_many_answers_are_refused():
  ranked = lambda count: Ranking("p", ("ab",) * count, (1,) * count, None)
  ctx = types.SimpleNamespace(config=micro.config("rm", {}), tokenizer=micro.characters())
  assert ctx.config.rm.max_responses == 3
  (found,) = ranking_accuracy.tokenized(ctx, [ranked(3)])
  assert found.prompt == [112] and found.responses == [[97, 98, 1]] * 3
  with pytest.raises(UserError, match="4 ranked responses; raise rm.max_responses=3"):
    ranking_accuracy.tokenized(ctx, [ranked(2), ranked(4)])
  assert ranking_accuracy.tokenized(ctx, []) == []
