"""Tests of instructjax.report: what the page holds, escapes and can do without; its arithmetic."""

import dataclasses
import html.parser
import json
import re
import types

import numpy as np
import pytest

from instructjax import report
from instructjax.core import results as core_results
from instructjax.report import (
  costs,
  equal_kl,
  figures,
  findings,
  overoptimization_points,
  page,
  panels,
  tables,
)
from tests import finished_run
from tests.report import example

BOOTSTRAP = 20
SECTIONS = [
  "samples", "findings", "policies", "untrained", "habits", "new-topics", "wins", "curves", "equal-kl", "tax",
  "reward-model", "overoptimization", "costs", "made",
]  # fmt: skip
NAMESPACE = types.SimpleNamespace
MADE = {
  "ppo_ptx": finished_run.MADE,
  "evaluate": dataclasses.replace(finished_run.MADE, seconds=7.0),
}
TOOK = costs.by_stage(
  {"ppo_ptx": [{"step": step, "seconds": 20.0 / step, "tokens": 150.0} for step in (1, 2, 4)]}, MADE
)
CONFIG = NAMESPACE(
  preset="tiny",
  seed=3,
  model=NAMESPACE(num_layers=4, d_model=128),
  reward_model=NAMESPACE(num_layers=6, d_model=192),
  ppo=NAMESPACE(num_iterations=5, batch_size=64, beta=0.1, gamma=0.3),
  evaluate=NAMESPACE(bootstrap=BOOTSTRAP),
)


class _Document(html.parser.HTMLParser):
  """Checks that tags close in order, and gathers ids, references and the text of each section."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.ids, self.references, self.tags, self.text = [], [], [], set(), {}
    self._section = None
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    attrs = dict(attrs)
    self.references += [attrs[key] for key in ("href", "src", "xlink:href") if key in attrs]
    self.references += re.findall(r"url\((.*?)\)", " ".join(v or "" for v in attrs.values()))
    if tag == "section":
      self._section = attrs["id"]
      self.ids.append(attrs["id"])
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text[self._section] = self.text.get(self._section, "") + data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A whole report: (directory, parsed page, findings, results)."""
  directory = tmp_path_factory.mktemp("run") / "report"
  results = example.results()
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  found[0] |= {
    "claim": f"a claim {example.NASTY}",
    "holds": False,
    "measured": {"zero_shot": np.nan},
  }
  report.write(directory, CONFIG, example.PROMPTS, results, found, MADE, TOOK)
  text = (directory / "index.html").read_text(encoding="utf-8")
  return directory, _Document(text), found, results


def test_page_has_every_section_and_stands_alone(written):
  directory, document, _, _ = written
  assert document.ids == SECTIONS
  assert "script" not in document.tags and "link" not in document.tags
  assert document.references and all(r.startswith("#") for r in document.references)
  assert (directory / "index.html").stat().st_size < 2_000_000
  assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_text_from_data_is_escaped(written):
  _, document, _, _ = written
  assert example.NASTY in document.text["findings"]
  assert example.NASTY in document.text["samples"]
  assert "say <b>0</b> & more" in document.text["samples"]


def test_nothing_from_data_becomes_markup():
  """A prompt, an answer, a claim and the preset's name try to leave their tags, attributes included."""
  results, hostile = example.results(), "\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"
  base = dataclasses.replace(results.measured["base"], answer=[hostile] * 24)
  results = dataclasses.replace(results, measured=results.measured | {"base": base})
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  found[0] |= {"claim": hostile, "paper": hostile, "rule": hostile, "measured": {hostile: 1.0}}
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  config = NAMESPACE(**vars(CONFIG) | {"preset": hostile})
  made = {"evaluate": dataclasses.replace(finished_run.MADE, command=hostile)}
  text = page.page(config, [hostile] * 24, results, found, wins, made, costs.by_stage({}, made))
  document = _Document(text)
  assert "img" not in document.tags and "<img" not in text
  # The claim twice; the measured name in brief too, since it has an interval.
  assert document.text["findings"].count(hostile) == 6
  assert document.text["samples"].count(hostile) == 2  # one prompt, and base's answer to it
  assert document.text["made"].count(hostile) == 1
  assert document.text[None].count("onerror") == 2  # the title, and what ran


def test_text_of_other_scripts_and_control_characters_stay_in_their_place():
  results, hostile = example.results(), "\u202eאב\x1b[2J\x00\udcff[/b]"
  base = dataclasses.replace(results.measured["base"], answer=[hostile] * 24)
  results = dataclasses.replace(results, measured=results.measured | {"base": base})
  made = {"evaluate": dataclasses.replace(finished_run.MADE, command=hostile)}
  config = NAMESPACE(**vars(CONFIG) | {"preset": hostile})
  text = page.page(config, [hostile] * 24, results, [], {}, made, costs.by_stage({}, made))
  shown = r"\u202eאב\x1b[2J\x00\udcff[/b]"
  assert f'<div class="prompt" dir="auto">{shown}</div>' in text
  assert f'<p dir="auto">{shown}</p>' in text
  assert f"<td><bdi>{shown}</bdi></td>" in text
  assert f'dir="auto">preset\xa0{shown},' in text
  text.encode()  # a path of bytes that are not UTF-8 does not fail after the last stage
  assert not set(text) & set("\u202e\x1b\x00")


def test_an_interval_stands_beside_its_own_value():
  finding = {
    "id": "topic_following",
    "measured": {"ppo_ptx_minus_sft": 0.15, "sft": 0.5},
    "interval": [[0.1, 0.2]],
  }
  assert page._measured(finding) == [("PPO-ptx − SFT", "15%", "[10%, 20%]"), ("SFT", "50%", "")]


def test_where_the_run_comes_from(written):
  _, document, _, _ = written
  text = document.text["made"]
  for what in ("commit abc123+changes", "--config=ppo_ptx", "books.jsonl sha256:9", "TPU v5 lite"):
    assert what in text
  assert "after 7 s" in text, "the facts are of the last stage, which wrote the report"
  assert "ppo_ptx2026-03-01T12:00:00Zinstructjax 1.2.3" in text.replace("\n", "")


def test_findings_are_shown_as_judged(written):
  directory, document, found, _ = written
  text = document.text["findings"]
  verdicts = [finding["holds"] for finding in found]
  assert len(found) == 11 and {True, False, None} == set(verdicts)
  assert text.count("does not hold") == verdicts.count(False)
  assert text.count("cannot be told") == verdicts.count(None) + 1  # once in the words above
  assert f"{verdicts.count(True)} of 11 hold" in text
  for finding in found:
    assert f"Holds if {finding['rule']}.".replace("+-", "±").replace(" - ", " − ") in text
  stored = json.loads((directory / "findings.json").read_text())
  assert [finding["id"] for finding in stored] == [finding["id"] for finding in found]
  assert stored[0]["measured"] == {"zero_shot": None} and stored[0]["holds"] is False
  low, high = found[2]["interval"][0]
  assert stored[2]["interval"][0] == [low, high]


def test_win_matrix_shows_each_rate_with_its_interval(written):
  _, document, _, results = written
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=CONFIG.seed)
  text = document.text["wins"]
  for a, row in wins.items():
    cells = (
      "·" if b == a else "{:.0f}%{:.0f}–{:.0f}".format(*(100 * x for x in (row[b][0], *row[b][1])))
      for b in wins
    )
    assert panels.NAMES[a] + "".join(cells) in text


def test_samples_put_the_answers_to_one_prompt_side_by_side(written):
  _, document, _, _ = written
  text = document.text["samples"]
  assert text.count("say <b>") == page.NUM_SAMPLES
  first = text[text.index("say <b>0") : text.index("say <b>2")]
  assert first.count(f"answer 0 {example.NASTY}") == 8
  order = [first.index(panels.NAMES[n]) for n in ("base", "sft", "ppo", "ppo_ptx", "reward_base")]
  assert order == sorted(order)


def _without(results, *names):
  """The results without some policies."""
  kept = lambda part: {name: found for name, found in part.items() if name not in names}
  parts = ("measured", "pretraining", "curves", "new_topics", "best_at_kl")
  parts = {part: kept(getattr(results, part)) for part in parts}
  return dataclasses.replace(results, **parts)


def _without_gold(results):
  """A user's own data: no simulation, so no gold score, agreement or few-shot prompt."""
  results = _without(results, "few_shot")
  bare = lambda found: dataclasses.replace(found, gold=None, names_topic=None, topic_again=None)
  logged = lambda row: {name: value for name, value in row.items() if name != "gold"}
  results = dataclasses.replace(
    results,
    measured={name: bare(found) for name, found in results.measured.items()},
    curves={name: list(map(logged, rows)) for name, rows in results.curves.items()},
    reward_model=dataclasses.replace(results.reward_model, heldout_labelers=None),
    agreement=None,
    best_of_n=[dataclasses.replace(row, gold=None) for row in results.best_of_n],
    best_at_kl={n: dataclasses.replace(best, gold=None) for n, best in results.best_at_kl.items()},
    untrained={"echo": bare(results.untrained["echo"])},
    checkpoints={
      name: {step: bare(found) for step, found in kept.items()}
      for name, kept in results.checkpoints.items()
    },
    new_topics={},
    gold_words="",
    shots={},
  )
  return results, [section for section in SECTIONS if section != "new-topics"]


def _one_policy(results):
  """Only PPO-ptx, with one base, no over-optimisation runs, and no folds."""
  results = _without(results, "ppo", "ppo_beta0", "reward_base", "few_shot")
  reward_model = dataclasses.replace(results.reward_model, cross_validation=())
  return dataclasses.replace(results, reward_model=reward_model), SECTIONS


def _no_rl(results):
  """Nothing but the supervised policies."""
  gone = ("curves", "equal-kl", "overoptimization")
  results = _without(results, "ppo", "ppo_ptx", "ppo_beta0")
  results = dataclasses.replace(results, best_of_n=())
  return results, [section for section in SECTIONS if section not in gone]


def _all_given(results):
  """Policy and reward model were given: no base, no baseline, no rankings."""
  results = _without(results, "base", "reward_base", "few_shot", "sft")
  results = dataclasses.replace(
    results,
    reward_model=core_results.RewardModel(None, None, None, ()),
    agreement=None,
    pretraining={},
  )
  return results, [section for section in SECTIONS if section not in ("reward-model", "tax")]


@pytest.mark.parametrize("remove", [_without_gold, _one_policy, _no_rl, _all_given])
def test_what_was_not_measured_is_left_out(remove):
  results, expected = remove(example.results())
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  document = _Document(page.page(CONFIG, example.PROMPTS, results, found, wins, MADE, TOOK))
  assert document.ids == expected
  assert ("gold score" in document.text["wins"]) == (remove is not _without_gold)
  assert document.references.count("#overoptimization") == ("overoptimization" in expected)
  title = "Best of n and reward" if remove is _without_gold else "Over-optimisation"
  assert document.text.get("overoptimization", title).strip().startswith(title)


def _document_of(results):
  text = page.page(CONFIG, example.PROMPTS, results, [], {}, MADE, TOOK)
  return _Document(text)


def test_the_page_says_what_the_curves_at_equal_kl_are_of():
  logs, kept = (
    " ".join(_document_of(results).text["equal-kl"].split())
    for results in (example.results(), example.with_checkpoints())
  )
  assert "RL runs, by iteration, on their training prompts; best of n on 2 of the" in logs
  assert "running means" in logs and "resampling the iterations of a run (" in logs
  on_test = (
    "RL runs, from the initialisation over their checkpoints (dots) to their end, on test prompts"
  )
  assert on_test in kept and "95% intervals over test prompts" in kept
  assert "resampling the test prompts, of the initialisation" in kept
  for word in ("training prompts", "running means", "iterations"):
    assert word not in kept
  # The dots in numbers too.
  table = equal_kl.table(example.with_checkpoints(), bootstrap=BOOTSTRAP, seed=CONFIG.seed)
  point = table["methods"]["ppo_ptx"]["checkpoints"][1]
  cells = (
    "{} [{}, {}]".format(*map(tables.number, (point[key], *point[bounds]))).replace(" [", "[")
    for key, bounds in (("kl", "kl_interval"), ("gain", "interval"))
  )
  assert f"PPO-ptx4{''.join(cells)}" in kept
  assert "The checkpoints in numbers" not in logs


def test_checkpoints_without_a_penalty_are_told_in_words():
  without, with_points = (
    " ".join(_document_of(results).text["overoptimization"].split())
    for results in (example.results(), example.with_checkpoints())
  )
  points = overoptimization_points.of_results(
    example.with_checkpoints(), bootstrap=BOOTSTRAP, seed=CONFIG.seed
  )
  assert f"95% intervals: {overoptimization_points.in_words(points)}. Squares" in with_points
  assert "Diamonds" not in without and "PPO are of its log, on training prompts" in without
  bare, _ = _without_gold(example.with_checkpoints())
  text = " ".join(_document_of(bare).text["overoptimization"].split())
  assert "Dashed line of PPO: its log" in text and "95% intervals: after 2 iterations d = " in text


def test_overview_has_only_panels_with_something_to_show(tmp_path):
  results, _ = _without_gold(_no_rl(example.results())[0])
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  figures.overview(results, wins, [], tmp_path / "report.png")
  # Three panels are left: pretraining loss, win rates, reward model. Width and height, big-endian.
  header = (tmp_path / "report.png").read_bytes()[16:24]
  assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (14 * 110, 4 * 110)


def test_samples_are_different_prompts_evenly_spread():
  prompts = [p for p in "abcdefghij" for _ in range(2)]
  assert page.chosen_samples(prompts, 5) == [0, 4, 8, 12, 16]
  assert page.chosen_samples(list("aab"), 5) == [0, 2]


def test_plain_json():
  given = {"a": np.float32(1.5), 2: (np.int64(3), np.array([True])), "b": np.inf, "c": "text"}
  assert page.plain(given) == {"a": 1.5, "2": [3, [True]], "b": None, "c": "text"}
  assert json.dumps(page.plain(given), allow_nan=False)


@pytest.mark.parametrize(
  "value, text", [(-1.234, "−1.23"), (0.5, "0.50"), (123.4, "123"), (np.nan, "–"), (None, "–")]
)
def test_number(value, text):
  assert tables.number(value) == text
