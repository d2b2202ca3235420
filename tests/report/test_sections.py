"""Values of the report's sections of curves; that the page shows them: test_page.py."""

from instructjax.report import equal_kl, rounds, sections
from tests.report import example
from tests.report.test_rounds import two_rounds


def at_equal_kl(results):
  return sections.at_equal_kl(results, equal_kl.table(results, bootstrap=50, seed=0))


def test_gains_at_equal_kl_stand_below_their_levels():
  table = equal_kl.table(example.results(), bootstrap=50, seed=0)
  found = sections.at_equal_kl(example.results(), table)
  assert [float(level) for level in found["levels"]] == list(table["kl"])
  assert [row["title"] for row in found["rows"]][-1] == "Best of n"
  for row, method in zip(found["rows"], table["methods"].values(), strict=True):
    for (value, interval), gain in zip(row["cells"], method["at"], strict=True):
      assert (value == "not reached") is (gain is None)
      assert bool(interval) is bool(gain and gain["interval"])
  assert found["score"] == "gold score" and found["best_of_n"].startswith("2 of the ")
  assert not found["is_of_test_prompts"]
  assert at_equal_kl(example.with_checkpoints())["is_of_test_prompts"]


def test_without_a_table_there_is_no_section():
  assert sections.at_equal_kl(example.results(), {}) == {}
  assert sections.by_round({}) == {}


def test_rounds_have_a_column_for_held_out_labelers_only_where_there_were_some():
  found = sections.by_round(rounds.table(two_rounds(), bootstrap=50, seed=0))
  assert found["heldout"] == [2]  # nobody was held out in the first round
  first, second = found["reward_models"]
  assert [row["title"] for row in (first, second)] == [f"Reward model, round {n}" for n in (1, 2)]
  assert [value for value, _ in first["cells"][:3]] == ["0.70", "0.50", "0.40"]
  assert [value for value, _ in second["cells"][:3]] == ["0.70", "0.65", "0.55"]
  assert [row["name"] for row in found["policies"]] == ["ppo_ptx", "ppo_ptx_2"]
  assert found["policies"][0]["cells"][1] == ("", "")  # no round before it
