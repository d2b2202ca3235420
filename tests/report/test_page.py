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
from instructjax.ops import preference
from instructjax.report import figures, findings, overoptimization, page, panels
from instructjax.report.results import BestOfN, Measured, Results
from tests import finished_run

BOOTSTRAP = 20
PROMPTS = [f"say <b>{i // 2}</b> & more\n" for i in range(24)]  # two samples a prompt
NASTY = '<script>alert("x")</script>'
SECTIONS = [
  "findings", "samples", "policies", "wins", "curves", "tax", "reward-model", "overoptimization", "made",
]  # fmt: skip
NAMESPACE = types.SimpleNamespace
MADE = {
  "ppo_ptx": finished_run.MADE,
  "evaluate": dataclasses.replace(finished_run.MADE, seconds=7.0),
}
CONFIG = NAMESPACE(
  preset="tiny",
  seed=3,
  model=NAMESPACE(num_layers=4, d_model=128),
  reward_model=NAMESPACE(num_layers=6, d_model=192),
  ppo=NAMESPACE(num_iterations=5, batch_size=64, beta=0.1, gamma=0.3),
  evaluate=NAMESPACE(bootstrap=BOOTSTRAP),
)


def _measured(rng, gold: float, has_kl: bool) -> Measured:
  return Measured(
    answer=[f"answer {i} {NASTY}" for i in range(24)],
    reward=rng.normal(gold, 1, 24).astype(np.float32),
    gold=rng.normal(gold, 1, 24),
    ended=rng.random(24) < 0.8,
    length=rng.integers(3, 9, 24),
    names_topic=rng.random(24) < 0.5,
    kl=rng.normal(4, 1, 24) if has_kl else None,
  )


def _judged(accuracy: float) -> core_results.Judgement:
  found = preference.calibration(np.linspace(-1, 3, 50))
  return core_results.Judgement(
    accuracy=accuracy,
    accuracy_stderr=0.01,
    pairs=50,
    prompts=25,
    score_std=1.0,
    calibration=core_results.Calibration(*map(tuple, found[:3]), found.expected_error),
  )


def _reward_model() -> core_results.RewardModel:
  folds = (core_results.Fold(heldout=0.6, train=0.7), core_results.Fold(heldout=0.64, train=0.7))
  return core_results.RewardModel(0.0, _judged(0.70), _judged(0.68), folds)


def _results() -> Results:
  rng = np.random.default_rng(0)
  golds = {
    "base": 0, "reward_base": 0, "few_shot": 0.5, "sft": 1, "ppo_init": 1, "ppo": 2, "ppo_ptx": 2,
    "ppo_beta0": 0,
  }  # fmt: skip
  measured = {n: _measured(rng, g, i > 2) for i, (n, g) in enumerate(golds.items())}
  texts = [name for name in golds if name not in ("reward_base", "few_shot")]
  curves = {
    name: [
      {"step": s, "reward": 0.1 * s, "kl": 0.4 * s - 0.5, "gold": 1.0, "entropy": 9.0 - s,
       "response_length": 6.0, "eos": 1.0} | ({"validation/pretrain_loss": 3.0} if s in (1, 4) else {})
      for s in range(1, 6)
    ]
    for name in ("ppo", "ppo_ptx", "ppo_beta0")
  }  # fmt: skip
  agreement = core_results.Agreement(0.72, 0.01, 0.1)
  return Results(
    samples_per_prompt=2,
    measured=measured,
    pretraining={n: np.array([[30.0 + i, 10.0], [31.0, 10.0]]) for i, n in enumerate(texts)},
    reward_model=_reward_model(),
    agreement=core_results.LabelerGroups(train=agreement, heldout=agreement),
    best_of_n=[
      BestOfN(n=n, kl=float(np.log(n) - (n - 1) / n), gold=1 + np.log(n), reward=np.log(n))
      for n in (1, 2, 4, 8)
    ],
    curves=curves,
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
  results = _results()
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  found[0] |= {"claim": f"a claim {NASTY}", "holds": False, "measured": {"zero_shot": np.nan}}
  report.write(directory, CONFIG, PROMPTS, results, found, MADE)
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
  assert NASTY in document.text["findings"]
  assert NASTY in document.text["samples"]
  assert "say <b>0</b> & more" in document.text["samples"]


def test_nothing_from_data_becomes_markup():
  """A prompt, an answer, a claim and the preset's name try to leave their tags, attributes included."""
  results, hostile = _results(), "\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"
  base = dataclasses.replace(results.measured["base"], answer=[hostile] * 24)
  results = dataclasses.replace(results, measured=results.measured | {"base": base})
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  found[0] |= {"claim": hostile, "paper": hostile, "measured": {hostile: 1.0}}
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  config = NAMESPACE(**vars(CONFIG) | {"preset": hostile})
  made = {"evaluate": dataclasses.replace(finished_run.MADE, command=hostile)}
  text = page.page(config, [hostile] * 24, results, found, wins, made)
  document = _Document(text)
  assert "img" not in document.tags and "<img" not in text
  assert document.text["findings"].count(hostile) == 3
  assert document.text["samples"].count(hostile) == 2  # one prompt, and base's answer to it
  assert document.text["made"].count(hostile) == 1
  assert document.text[None].count("onerror") == 2  # the title, and what ran


def test_where_the_run_comes_from(written):
  _, document, _, _ = written
  text = document.text["made"]
  for what in ("commit abc123+changes", "--config=ppo_ptx", "books.jsonl sha256:9", "TPU v5 lite"):
    assert what in text
  assert "after 7 s" in text, "the facts are of the last stage, which wrote the report"
  assert "ppo_ptx2026-03-01T12:00:00Z61instructjax 1.2.3" in text.replace("\n", "")


def test_findings_are_shown_as_judged(written):
  directory, document, found, _ = written
  text = document.text["findings"]
  holding = sum(finding["holds"] for finding in found)
  assert 0 < holding < len(found) == 7
  assert text.count("does not hold") == len(found) - holding
  assert f"{holding} of {len(found)} hold" in text
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
  assert first.count(f"answer 0 {NASTY}") == 8
  order = [first.index(panels.NAMES[n]) for n in ("base", "sft", "ppo", "ppo_ptx", "reward_base")]
  assert order == sorted(order)


def _without(results, *names):
  """The results without some policies."""
  kept = lambda part: {name: found for name, found in part.items() if name not in names}
  parts = {part: kept(getattr(results, part)) for part in ("measured", "pretraining", "curves")}
  return dataclasses.replace(results, **parts)


def _without_gold(results):
  """A user's own data: no simulation, so no gold score, agreement, best-of-n or few-shot prompt."""
  results = _without(results, "few_shot")
  bare = lambda found: dataclasses.replace(found, gold=None, names_topic=None)
  logged = lambda row: {name: value for name, value in row.items() if name != "gold"}
  results = dataclasses.replace(
    results,
    measured={name: bare(found) for name, found in results.measured.items()},
    curves={name: list(map(logged, rows)) for name, rows in results.curves.items()},
    reward_model=dataclasses.replace(results.reward_model, heldout_labelers=None),
    agreement=None,
    best_of_n=(),
  )
  return results, [section for section in SECTIONS if section != "overoptimization"]


def _one_policy(results):
  """Only PPO-ptx, with one base, no over-optimisation runs, and no folds."""
  results = _without(results, "ppo", "ppo_beta0", "reward_base", "few_shot")
  reward_model = dataclasses.replace(results.reward_model, cross_validation=())
  return dataclasses.replace(results, reward_model=reward_model), SECTIONS


def _no_rl(results):
  """Nothing but the supervised policies."""
  results = dataclasses.replace(_without(results, "ppo", "ppo_ptx", "ppo_beta0"), best_of_n=())
  return results, [section for section in SECTIONS if section not in ("curves", "overoptimization")]


@pytest.mark.parametrize("remove", [_without_gold, _one_policy, _no_rl])
def test_what_was_not_measured_is_left_out(remove):
  results, expected = remove(_results())
  found = findings.find(results, bootstrap=BOOTSTRAP, seed=0)
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  document = _Document(page.page(CONFIG, PROMPTS, results, found, wins, MADE))
  assert document.ids == expected
  assert ("gold score" in document.text["wins"]) == (remove is not _without_gold)
  assert document.references.count("#overoptimization") == ("overoptimization" in expected)


def test_overview_has_only_panels_with_something_to_show(tmp_path):
  results, _ = _without_gold(_no_rl(_results())[0])
  wins = findings.win_matrix(results, bootstrap=BOOTSTRAP, seed=0)
  figures.overview(results, wins, tmp_path / "report.png")
  # Three panels are left: pretraining loss, win rates, reward model. Width and height, big-endian.
  header = (tmp_path / "report.png").read_bytes()[16:24]
  assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (14 * 110, 4 * 110)


def test_figures_are_the_same_twice_and_take_the_page_s_ink():
  draw = [lambda ax: bool(ax.plot([0, 1], [1, 0], label="a"))]
  first = figures.svg(draw, "a line", columns=1)
  assert first == figures.svg(draw, "a line", columns=1)
  assert "<dc:date>" not in first  # which would differ from run to run
  assert 'aria-label="a line"' in first and panels.INK not in first and "currentColor" in first
  assert figures.svg([lambda ax: False], "nothing", columns=2) == ""


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
  assert page.number(value) == text


def test_running_mean():
  np.testing.assert_allclose(panels.running_mean([1, 2, 3, 10], 3), [1, 2, 5, 10])
  np.testing.assert_allclose(panels.running_mean([1, 2, 3, 10], 1), [1, 2, 3, 10])
  # Window 5: at its full reach in the middle, 3 wide next to the ends, 1 at them.
  np.testing.assert_allclose(panels.running_mean([1, 2, 6, 1, 0], 5), [1, 3, 2, 7 / 3, 0])
  assert panels.running_mean([], 3).shape == (0,)


def test_pretraining_loss_is_a_mean_over_tokens():
  # 11 nats over 10 tokens, not the mean of the rows' 2 and 1.
  results = dataclasses.replace(_results(), pretraining={"sft": np.array([[2, 1], [9, 9]])})
  assert panels.pretraining_loss(results) == {"sft": 1.1}


def test_accuracy_rows():
  rows = panels.accuracy_rows(_results())
  named = {label: (value, half) for label, value, half, _ in rows}
  assert len(rows) == 6
  assert named["Reward model, held-out labelers"] == (0.68, pytest.approx(0.0196))
  # Folds .60 and .64: standard deviation .02 sqrt 2, standard error .02.
  assert named["Cross-validation, fold left out"] == pytest.approx((0.62, 1.96 * 0.02))
  assert rows[-1][3] == (0.773, 0.013)
  reward_model = core_results.RewardModel(0.0, _judged(0.6), None, ())
  alone = dataclasses.replace(_results(), reward_model=reward_model, agreement=None)
  assert [row[0] for row in panels.accuracy_rows(alone)] == ["Reward model, held-out prompts"]


def test_column_takes_rows_that_have_all_metrics():
  rows = [{"a": 1, "b": 2}, {"a": 3}, {"a": 5, "b": 6}]
  np.testing.assert_array_equal(overoptimization.column(rows, "a", "b"), [[1, 5], [2, 6]])
  np.testing.assert_array_equal(overoptimization.column(rows, "a"), [[1, 3, 5]])


def test_overoptimization_scores_start_at_zero_in_standard_deviations():
  init = dataclasses.replace(
    _results().measured["ppo_init"],
    gold=np.array([0.0, 4.0]),  # deviation 2
    reward=np.array([1.0, 2.0]),  # 0.5
  )
  results = dataclasses.replace(
    _results(),
    measured={"ppo_init": init},
    best_of_n=[
      BestOfN(n=1, kl=0.0, gold=2.0, reward=1.5),
      BestOfN(n=2, kl=0.25, gold=3.0, reward=2.0),
    ],
    curves={
      "ppo": [{"kl": 0.0, "gold": 1.0, "reward": 1.2}],
      "ppo_beta0": [
        {"kl": -0.1, "gold": 3.0, "reward": 1.4},
        {"kl": 9.0, "gold": 0.0, "reward": 2.3},
      ],
    },
  )
  scores = overoptimization.scores(results)
  for which, distance, gold, reward in (
    ("best_of_n", [0, 0.5], [0, 0.5], [0, 1]),
    ("rl", [0, 3], [0.5, -1], [0.2, 2]),  # origin: the first iterations' means, 2 and 1.3
  ):
    np.testing.assert_allclose(scores[which]["distance"], distance)
    np.testing.assert_allclose(scores[which]["gold"], gold)
    np.testing.assert_allclose(scores[which]["reward"], reward)
  without = {"ppo_init": dataclasses.replace(init, gold=None)}
  assert overoptimization.scores(dataclasses.replace(results, measured=without)) == {}


@pytest.mark.parametrize("which", ["best_of_n", "rl"])
def test_fit_recovers_the_curve_and_its_peak(which):
  distance = np.linspace(0, 8, 400)
  score = overoptimization.curve(which, distance, 0.9, 0.3)
  np.testing.assert_allclose(overoptimization.fit(which, distance, score), [0.9, 0.3])
  top = overoptimization.peak(which, 0.9, 0.3)
  assert top == pytest.approx(distance[np.argmax(score)], abs=0.02)
  assert overoptimization.peak(which, 0.9, -0.1) is None


def test_curves_are_those_of_gao_et_al():
  # d = 2, alpha = 3, beta = 0.5: 2 (3 - 0.5 * 2) and 2 (3 - 0.5 log 2).
  np.testing.assert_allclose(overoptimization.curve("best_of_n", [0, 2], 3, 0.5), [0, 4])
  np.testing.assert_allclose(overoptimization.curve("rl", [0, 2], 3, 0.5), [0, 6 - np.log(2)])


def test_no_fit_where_points_do_not_determine_one():
  assert overoptimization.fit("rl", [0.0, 2.0], [0.0, 1.0]) is None
  assert overoptimization.fit("best_of_n", [0.0, 0.0, 2.0], [0.0, 0.0, 1.0]) is None
  assert overoptimization.peak("best_of_n", -1.0, 0.3) is None


def test_ticks_of_an_axis_of_square_roots():
  assert panels.square_root_ticks(16.0) == [0, 1, 4, 9]  # 16 is two digits, 20 above the axis
  assert panels.square_root_ticks(0.64) == [0, 0.04, 0.2, 0.4, 0.6]
