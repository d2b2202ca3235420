"""The page of a comparison: every number of every group is on it, and whatever the data say is only text."""

import json
import re

from instructjax.report import comparison_groups, comparison_page
from tests.report import runs


def groups():
  return comparison_groups.groups(
    [runs.run(seed, beta) for beta in (0.0, 0.5) for seed in (0, 1, 2)]
  )


def test_the_page_has_all_groups_and_numbers(tmp_path):
  path = comparison_page.write(tmp_path / "out", groups())
  text = path.read_text()
  assert "6 runs compared" in text
  for label in ("ppo.beta=0.0", "ppo.beta=0.5"):
    assert text.count(label) > 5
  assert "holds in 1 of 3, does not in 1, cannot be told in 1" in text
  assert "60% ± 10%" not in text and "0.70 ± 0.10" not in text
  assert "4.00 ± 1.00" in text and "[1.52, 6.48]" in text  # gold: 3, 4, 5; 4 -+ 2.4842
  assert "−0.50 ± 0.00" in text  # the paired difference
  assert text.count("<svg") == 3
  found = json.loads((path.parent / "comparison.json").read_text())
  assert found["policies"]["ppo_ptx"]["gold"][0]["values"] == [3.0, 4.0, 5.0]
  assert [run["seed"] for run in found["groups"][0]["runs"]] == [0, 1, 2]


def test_figures_say_their_values_in_words():
  text = comparison_page.page(groups())
  labels = re.findall(r'aria-label="([^"]*)"', text)
  assert len(labels) == 3
  assert "PPO-ptx over SFT: ppo.beta=0.0 70% (45% to 95%)" in labels[0]
  assert "ppo.beta=0.5, PPO-ptx: KL 4.00 (4.00 to 4.00), gold score gained 1.50" in labels[1]
  assert "loss above SFT's 0.10" in labels[2] or "loss above SFT&#x27;s 0.10" in labels[2]


def test_one_run_alone_has_no_error_bars():
  text = comparison_page.page(comparison_groups.groups([runs.run(0)]))
  assert "1 run compared" in text and "no error bars" in text
  assert "±" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_names_of_folders_are_text():
  odd = [runs.run(seed, name=f"<script>{seed}\x1b[31m") for seed in (0, 1)]
  text = comparison_page.page(comparison_groups.groups(odd))
  assert "<script>" not in text and "&lt;script&gt;0" in text and "\x1b" not in text


def test_the_terminal_shows_findings_and_policies(capsys):
  comparison_page.show(groups())
  printed = capsys.readouterr().out
  assert "rl_over_sft" in printed and "ppo.beta=0.5" in printed
