"""Rules by which a choice wins, worked by hand."""

import dataclasses
import math

import pytest

from instructjax.evaluation import choosing
from tests.evaluation.fake import choice


def test_each_rule_chooses_by_its_own_number():
  # Sums -4, -3, -6; a token -1, -3, -2; over characters -4/10, -3/2, -6/20.
  choices = [choice(-1, -1, -1, -1), choice(-3), choice(-2, -2, -2)]
  lengths = [10, 2, 20]
  assert choosing.scores(0, choices, lengths) == {"accuracy": 1, "acc": 0, "acc_norm": 0}
  assert choosing.scores(1, choices, lengths) == {"accuracy": 0, "acc": 1, "acc_norm": 0}
  assert choosing.scores(2, choices, lengths) == {"accuracy": 0, "acc": 0, "acc_norm": 1}


def test_line_breaks_of_the_context_are_no_tokens_of_a_choice():
  """Of a chat's last line break: -3 and -2.9 a token; with the break before each, -2.00 and -2.49."""
  with_break = lambda *log_probs: dataclasses.replace(
    choice(-0.01, *log_probs), tokens=("\n", *["t"] * len(log_probs))
  )
  choices = [with_break(-3, -3), with_break(*[-2.9] * 6)]
  assert choosing.per_token(choices[0]) == -3.0
  assert choosing.scores(1, choices, [1, 1]) == {"accuracy": 1, "acc": 0, "acc_norm": 0}
  assert choosing.per_token(dataclasses.replace(choice(-0.5), tokens=("\n",))) == -0.5


def test_the_first_of_equals_wins():
  assert choosing.highest([-2.0, -1.0, -1.0]) == 1


@pytest.mark.parametrize(
  ("log_probs", "bits"),
  [
    ([-700.0, -700.0], 1.0),  # both would be 0 as numbers
    ([0.0, -1e4], 0.0),
    # P = 3/4 and 1/4: .75 log2(4/3) + .25 * 2 = .8113
    ([math.log(3) - 50, -50.0], 0.811278),
    ([-1.0] * 4, 2.0),
  ],
)
def test_entropy_in_bits(log_probs, bits):
  assert choosing.entropy_bits(log_probs) == pytest.approx(bits, abs=1e-6)
