"""Intervals over prompts, by a case in which verdicts on a prompt are all alike."""

import numpy as np
import pytest

from instructjax.evaluation import resampling


def test_intervals_resample_prompts_and_not_verdicts():
  one = np.zeros(40)
  one[:20] = 1.0
  prompt_N = resampling.numbers_of(["p"] * 20 + ["q"] * 20)  # one all right and one all wrong
  assert list(prompt_N) == [0] * 20 + [1] * 20
  found = resampling.share(one, prompt_N, 500, np.random.default_rng(0))
  assert found == (0.5, [0.0, 1.0]) and resampling.shown(found) == "0.500 [0.000, 1.000]"
  assert resampling.share(np.zeros(0), np.zeros(0, int), 10, None) is None
  assert resampling.shown(None) == ""


@pytest.mark.parametrize("number", [1, 3, 1000])
def test_blocks_draw_what_one_call_draws(monkeypatch, number):
  monkeypatch.setattr(resampling, "_BLOCK", 7)
  blocks = list(resampling.resamples(number, 11, np.random.default_rng(3)))
  assert len(blocks) == (2 if number == 1 else 6 if number == 3 else 11)
  whole = np.random.default_rng(3).integers(number, size=(11, number))
  np.testing.assert_array_equal(np.concatenate(blocks), whole)
