"""The report's tables: which rows and cells they have."""

import dataclasses

import numpy as np

from instructjax.report import findings, tables
from tests.report import example
from tests.report.test_page import CONFIG


def test_what_needs_no_training_stands_beside_the_win_rates_that_the_findings_have():
  results = example.results()
  found = {f["id"]: f for f in findings.find(results, bootstrap=20, seed=CONFIG.seed)}
  table = tables.untrained(results, CONFIG)
  assert table["columns"][0] == "Policy preferred to it"
  assert list(table["rows"])[:2] == ["Echo of the prompt", "One training line for all"]
  rate, (low, high) = (
    found["over_untrained"][key][what] for key, what in (("measured", "echo"), ("interval", 0))
  )
  assert table["rows"]["Echo of the prompt"][0] == f"PPO-ptx: {rate:.0%} [{low:.0%}, {high:.0%}]"
  best = table["rows"]["Best of 6 of PPO init, beside PPO-ptx"]
  assert best[1:4] == ["1.90", "1.00", "0.96"]
  assert best[0].startswith(f"PPO-ptx: {np.mean(results.best_at_kl['ppo_ptx'].wins_P):.0%}")


def test_habits_are_of_policies_and_of_what_needs_no_training():
  results = example.results()
  table = tables.habits(results)
  assert len(table["rows"]) == len(results.measured) + len(results.untrained)
  assert len(table["columns"]) == 4


def test_agreement_within_a_policy_is_over_its_own_answers():
  results = example.results()
  table = tables.within_policies(results, CONFIG)
  found = results.measured["ppo_ptx"]
  expected = np.corrcoef(found.reward, found.gold)[0, 1]
  (cell,) = table["rows"]["PPO-ptx"]
  assert cell.startswith(f"{tables.number(expected)} [")
  assert len(table["rows"]) == len(results.measured)


def test_without_a_gold_score_there_is_no_agreement_to_show():
  results = example.results()
  measured = {name: dataclasses.replace(row, gold=None) for name, row in results.measured.items()}
  table = tables.within_policies(dataclasses.replace(results, measured=measured), CONFIG)
  assert not table["rows"]


def test_new_topics_stand_beside_seen_ones():
  results = example.results()
  row = tables.new_topics(results)["rows"]["SFT"]
  seen, new = results.measured["sft"], results.new_topics["sft"]
  assert row[:2] == [tables.number(seen.gold.mean()), tables.number(new.gold.mean())]
  assert row[2:] == [
    tables.percent(seen.names_topic.mean()),
    tables.percent(new.names_topic.mean()),
  ]


def test_columns_that_no_row_fills_are_left_out():
  shown = tables.shots({0: 1.0, 2: -0.5})
  assert shown == "0: 1.00, 2: −0.50"
