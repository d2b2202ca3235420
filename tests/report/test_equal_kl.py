"""Gains at equal KL, by hand: where curves are read, what cannot be told, and the noise behind the intervals."""

import dataclasses

import numpy as np
import pytest

from instructjax.report import equal_kl
from tests.report import example


def curve(kl, gain, noise=()):
  return equal_kl.Curve(
    np.array(kl, float), np.array(gain, float), np.array(noise, float).reshape(2, -1), window=1
  )


def log(kls, golds, **others):
  return [{"step": i, "kl": k, "gold": g} | others for i, (k, g) in enumerate(zip(kls, golds))]


def test_a_curve_is_read_between_its_points_where_it_last_passes_the_kl():
  """On lines in sqrt(KL), so all here is said of its root."""
  kl, gain = np.array([0, 1, 3, 2, 5.0]) ** 2, np.array([0, 2, 3, 9, 4.0])
  read = lambda root: float(equal_kl.crossing(kl, gain, root**2))
  assert read(0.0) == 0.0
  assert read(0.25) == 0.5  # a quarter of the way to (1, 2)
  assert read(1.5) == 2.25  # a quarter of the way from (1, 2) to (3, 3)
  assert read(2.0) == 9.0  # not the earlier 2.5, half the way from (1, 2) to (3, 3)
  assert read(2.6) == pytest.approx(9 - 5 * 0.2)  # nor those on the way up to 3 and down to 2
  assert read(3.5) == pytest.approx(9 - 5 * 0.5)
  assert read(5.0) == 4.0 and np.isnan(read(5.1))
  # A KL below 0 is no distance: from there it is as far to 1 as from 0.
  assert equal_kl.crossing(np.array([-0.5, 1.0]), np.array([0.0, 2.0]), 0.25) == 1.0
  both = equal_kl.crossing(np.stack([kl, kl / 2]), np.stack([gain, gain]), 16.0)
  assert both[0] == pytest.approx(9 - 5 * 2 / 3) and np.isnan(both[1])


def test_gains_are_counted_from_the_mean_of_the_runs_first_iterations():
  results = dataclasses.replace(
    example.results(),
    curves={"ppo": log([0, 2], [1, 4]), "rloo": log([0, 4], [3, 4]), "grpo": log([0.0], [9.0])},
  )
  found = equal_kl.curves(results)
  assert set(found) == {"ppo", "rloo", "best_of_n"}  # one iteration is no curve
  np.testing.assert_allclose(found["ppo"].gain, [-1, 2])
  np.testing.assert_allclose(found["rloo"].gain, [1, 2])
  np.testing.assert_allclose(found["best_of_n"].gain, np.log([1, 2, 4, 8]))
  np.testing.assert_allclose(found["best_of_n"].by_prompt[:, 1], np.log(2) * np.array([0.5, 1.5]))


def test_levels_are_round_and_all_runs_reached_the_lowest():
  levels = lambda *tops: equal_kl.levels(
    {f"{i}": curve([0, top], [0, 1]) for i, top in enumerate(tops)}
  )
  assert levels(4.0, 30.0) == [1, 2, 5, 10, 20]
  assert levels(0.05, 0.1) == [0.01, 0.02, 0.05, 0.1]
  # .2, .5, 1 .. 100 are nine: the first, the last, and three between.
  assert levels(1.0, 100.0) == [0.2, 1, 5, 20, 100]
  assert levels(0.0, 3.0) == levels() == []
  far = equal_kl.levels({"ppo": curve([0, 2], [0, 1]), "best_of_n": curve([0, 99], [0, 1])})
  assert far == [0.5, 1, 2]


def test_a_curve_is_of_whole_means_and_of_the_start():
  """16 iterations: means of three. The last iteration has none around it."""
  kl = np.arange(16.0)
  score = np.array([3.0, *[0.0] * 13, 3, 9])
  found = equal_kl._smoothed(kl, score)
  np.testing.assert_allclose(found.kl, [0, *range(1, 15)])
  np.testing.assert_allclose(found.gain, [3, 1, *[0] * 11, 1, 4])
  np.testing.assert_allclose(found.noise[1, -1], (3 - 4) * np.sqrt(3 / 2))
  assert (found.window, found.noise.shape) == (3, (2, 14))
  short = equal_kl._smoothed(kl[:15], score[:15])
  assert (short.window, short.noise.size, len(short.kl)) == (1, 0, 15)


def test_noise_of_a_run_is_that_of_single_iterations():
  rng = np.random.default_rng(0)
  step = np.arange(800.0)
  single = step / 100, step / 400 + rng.normal(0, 0.5, 800)
  found = equal_kl._smoothed(*single)
  assert np.std(found.noise[1]) == pytest.approx(0.5, rel=0.1)
  reading = equal_kl.read(found, 4.0, bootstrap=200, seed=1)
  low, high = reading.interval
  # 101 iterations a mean: 1.96 * .5 / sqrt(101) = .098 to each side.
  assert low < 1.0 < high and (high - low) / 2 == pytest.approx(0.098, rel=0.35)


def test_what_cannot_be_told_is_not_told():
  noise = [[0.1, -0.1], [0.0, 0.0]]
  run = curve(np.arange(8) / 2, np.arange(8), noise)
  read = lambda curve, at: equal_kl.read(curve, at, bootstrap=50, seed=0)
  assert read(run, 3.6) is None
  # Its last point has it, but half of the resampled curves end below.
  assert read(run, 3.5) == equal_kl.Reading(7.0, None)
  assert read(run, 1.0).interval is not None
  assert read(curve([0, 1], [0, 2]), 0.25) == equal_kl.Reading(1.0, None)  # no noise is known


def test_the_interval_of_best_of_n_resamples_prompts():
  by_prompt = np.array([[0.0, 1.0], [0.0, 3.0]])
  found = dataclasses.replace(curve([0, 1], [0, 2]), by_prompt=by_prompt)
  # Half the way in sqrt(KL). Of the resampled pairs a quarter are twice the first prompt, a quarter twice the second.
  assert equal_kl.read(found, 0.25, bootstrap=200, seed=0) == equal_kl.Reading(1.0, (0.5, 1.5))


def answered(gold, kl):
  """Two prompts of two answers each."""
  rng = np.random.default_rng(0)
  found = example.measured_policy(rng, 0.0, has_kl=True).take(np.arange(4))
  return dataclasses.replace(found, gold=np.array(gold, float), kl=np.array(kl, float))


def measured_along(**changes):
  """One run, with a checkpoint at its iteration 3."""
  policies = {
    "ppo_init": answered([0, 2, 4, 6], [0] * 4),
    "ppo": answered([4, 4, 9, 11], [3, 5, 4, 4]),
  }
  values = dict(
    measured=policies,
    curves={"ppo": log([0, 2], [1, 4])},
    checkpoints={"ppo": {3: answered([1, 3, 4, 10], [0.5, 1.5, 0, 2])}},
    best_of_n=(),
  )
  return dataclasses.replace(example.results(), **values | changes)


def test_a_run_with_checkpoints_is_a_curve_on_the_test_prompts():
  """By prompt the checkpoint gains 1 and 2, and the end 3 and 5, over the initialisation's 1 and 5."""
  found = equal_kl.curves(measured_along())
  assert set(found) == {"ppo"}
  np.testing.assert_allclose(found["ppo"].kl, [0, 1, 4])
  np.testing.assert_allclose(found["ppo"].gain, [0, 1.5, 4])
  read = lambda at: equal_kl.read(found["ppo"], at, bootstrap=200, seed=0)
  assert read(1.0) == equal_kl.Reading(1.5, (1.0, 2.0))  # twice the first prompt, twice the second
  assert read(2.25) == equal_kl.Reading(2.75, (2.0, 3.5))  # half the way in sqrt(KL)
  assert read(4.1) is None


def test_the_kl_of_checkpoints_is_of_the_same_resampled_prompts():
  """A KL of 1 on the first prompt and of 9 on the second, where both gain 2."""
  init = answered([0, 0, 0, 0], [0] * 4)
  runs = dict(
    measured={"ppo_init": init, "ppo": answered([2] * 4, [16] * 4)},
    checkpoints={"ppo": {3: answered([2] * 4, [1, 1, 9, 9])}},
  )
  reading = equal_kl.read(
    equal_kl.curves(measured_along(**runs))["ppo"], 1.0, bootstrap=200, seed=0
  )
  assert reading.gain == pytest.approx(2 / np.sqrt(5))  # on the way to KL 5
  assert reading.interval == pytest.approx((2 / 3, 2.0))  # to KL 9, to KL 1


def test_how_hard_a_prompt_is_drops_out_of_a_gain():
  init = answered([0, 0, 100, 100], [0] * 4)
  better = answered([1, 1, 101, 101], [1] * 4)
  runs = dict(measured={"ppo_init": init, "ppo": better}, checkpoints={"ppo": {3: better}})
  found = equal_kl.curves(measured_along(**runs))["ppo"]
  assert equal_kl.read(found, 1.0, bootstrap=200, seed=0) == equal_kl.Reading(1.0, (1.0, 1.0))


def test_logs_are_the_curves_of_all_runs_if_one_has_no_checkpoints():
  two = {"ppo": log([0, 2], [1, 4]), "rloo": log([0, 4], [3, 4])}
  lacks = measured_along(curves=two)
  lacks.measured["rloo"] = lacks.measured["ppo"]
  found = equal_kl.curves(lacks)
  np.testing.assert_allclose(found["ppo"].gain, [-1, 2])
  np.testing.assert_allclose(found["rloo"].gain, [1, 2])
  table = equal_kl.table(lacks, bootstrap=20, seed=0)
  assert table["curves"] == "log" and table["methods"]["ppo"]["checkpoints"] == []
  both = dict(lacks.checkpoints) | {"rloo": lacks.checkpoints["ppo"]}
  has = dataclasses.replace(lacks, checkpoints=both)
  assert equal_kl.table(has, bootstrap=20, seed=0)["curves"] == "checkpoints"
  np.testing.assert_allclose(equal_kl.curves(has)["rloo"].gain, [0, 1.5, 4])


def test_the_table_has_each_checkpoint_with_its_intervals():
  table = equal_kl.table(measured_along(), bootstrap=200, seed=0)
  method = table["methods"]["ppo"]
  assert method["checkpoints"] == [
    {"step": 3, "kl": 1.0, "kl_interval": [1.0, 1.0], "gain": 1.5, "interval": [1.0, 2.0]}
  ]
  assert (method["end"]["kl"], method["end"]["gain"]) == (4.0, 4.0)
  assert [level for level, at in zip(table["kl"], method["at"]) if at] == table["kl"] == [1, 2]


def test_the_table_has_every_method_and_where_it_ended():
  results = example.results()
  table = equal_kl.table(results, bootstrap=20, seed=0)
  assert table["score"] == "gold" and set(table["methods"]) == {*results.curves, "best_of_n"}
  assert all(len(method["at"]) == len(table["kl"]) for method in table["methods"].values())
  end, policy = table["methods"]["ppo"]["end"], results.measured["ppo"]
  gain = np.mean(policy.gold) - np.mean(results.measured["ppo_init"].gold)
  assert (end["kl"], end["gain"]) == pytest.approx((np.mean(policy.kl), gain))
  assert end["interval"][0] < end["gain"] < end["interval"][1]
  assert table["methods"]["best_of_n"]["end"] is None
  # Best of 8 has log 8 - 7 / 8 = 1.2 nats.
  assert [gain is None for gain in table["methods"]["best_of_n"]["at"]] == [
    level > 1.3 for level in table["kl"]
  ]
  assert equal_kl.table(dataclasses.replace(results, curves={}), bootstrap=20, seed=0) == {}
