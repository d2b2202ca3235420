"""The paper's findings on public sets, from differences worked out by hand."""

import itertools

import pytest

from instructjax.report import public_findings


def metric(key, gaps, show="share", better=1, groups=50):
  """A metric with (first, second) -> (difference of the second minus the first, low, high)."""
  return {
    "key": key,
    "show": show,
    "better": better,
    "is_shown": True,
    "differences": [
      {"a": a, "b": b, "difference": gap[0], "interval": [gap[1], gap[2]], "num_groups": groups}
      for (a, b), gap in gaps.items()
    ],
  }


def part(task, prompt, *metrics):
  return {"task": task, "prompt": prompt, "metrics": list(metrics)}


def found(*parts):
  return {one["id"]: one for one in public_findings.find(parts, 10)}


def truth(low, high, groups=50, prompt="qa"):
  gap = {("base", "ppo_ptx"): ((low + high) / 2, low, high)}
  return part("truthful_qa", prompt, metric("true_info", gap, groups=groups))


def test_nothing_is_found_without_the_models_or_the_tasks():
  assert public_findings.find([], 10) == []
  other = metric("true_info", {("a", "b"): (0.1, 0.0, 0.2)})
  assert public_findings.find([part("truthful_qa", "qa", other)], 10) == []


@pytest.mark.parametrize(
  "low, high, holds", [(0.01, 0.3, True), (-0.1, 0.3, None), (-0.3, -0.1, False)]
)
def test_truth_is_told_by_the_interval(low, high, holds):
  one = found(truth(low, high))["truthful"]
  assert one["holds"] is holds
  assert one["measured"] == {"PPO-ptx − base": pytest.approx((low + high) / 2)}
  assert one["interval"] == [[low, high]]


def test_few_items_tell_nothing():
  assert found(truth(0.1, 0.3, groups=9))["truthful"]["holds"] is None


def test_the_papers_prompt_decides():
  one = found(truth(-0.3, -0.1, prompt="instruction"), truth(0.1, 0.3))["truthful"]
  assert one["holds"] is True and one["rule"].endswith("prompt qa")


def test_a_difference_is_turned_where_the_models_came_in_another_order():
  choice = metric("mc2", {("ppo_ptx", "base"): (-0.2, -0.3, -0.1)})
  one = found(part("truthful_qa_mc", "harness", choice))["truthful_choice"]
  assert one["holds"] is True and one["interval"] == [[0.1, 0.3]]
  assert one["measured"] == {"PPO-ptx − base": 0.2}


def test_toxicity_is_told_by_the_respectful_prompt():
  at = lambda prompt, value: part(
    "real_toxicity",
    prompt,
    metric("toxicity", {("base", "ppo_ptx"): (value, value - 0.01, value + 0.01)}, "score", -1),
  )
  one = found(at("basic", 0.5), at("respectful", -0.02))["toxicity"]
  assert one["holds"] is True
  assert one["measured"] == {"PPO-ptx − base, respectful": -0.02, "PPO-ptx − base, basic": 0.5}
  assert found(at("basic", -0.5)) == {}


@pytest.mark.parametrize("high, holds", [(0.05, True), (0.06, None)])
def test_bias_must_be_certain_not_to_have_fallen_much(high, holds):
  entropy = lambda low, high: metric("entropy", {("base", "ppo_ptx"): (0.0, low, high)}, "bits", 0)
  parts = (
    part("winogender", "basic", entropy(-0.1, 0.01)),
    part("crows_pairs", "basic", entropy(-0.1, high)),
  )
  assert found(*parts)["bias"]["holds"] is holds
  assert found(part("winogender", "basic", entropy(0.06, 0.2)))["bias"]["holds"] is False
  assert found(part("winogender", "basic", entropy(-0.1, 0.01)))["bias"]["holds"] is None  # of one


def regressed(ppo, ptx, half=0.03, show="share", **kwargs):
  """A metric on which PPO has lost `ppo` against the base and PPO-ptx won `ptx` back."""
  gaps = {
    ("base", "ppo"): (-ppo, -ppo - half, -ppo + half),
    ("ppo", "ppo_ptx"): (ptx, ptx - half, ptx + half),
    ("base", "ppo_ptx"): (ptx - ppo, ptx - ppo - half, ptx - ppo + half),
  }
  return metric("m", gaps, show, **kwargs)


def test_sets_count_alike_whatever_their_scale():
  parts = (
    part("hellaswag", "zero_shot", regressed(0.05, 0.04)),
    # Percent already; its interval is four points to either side.
    part("squad_v2", "few_shot", regressed(1.0, 6.0, half=4.0, show="percent")),
  )
  one = found(*parts)["regressions"]
  mean = dict(zip(one["measured"], zip(one["measured"].values(), one["interval"])))
  # Half-widths of 3 and 4 points make one of 5 / 2 of the mean.
  value, interval = mean["PPO − base"]
  assert value == pytest.approx(-3) and interval == pytest.approx([-5.5, -0.5])
  value, interval = mean["PPO-ptx − PPO"]
  assert value == pytest.approx(5) and interval == pytest.approx([2.5, 7.5])
  assert mean["PPO-ptx − base"][0] == pytest.approx(2)
  assert one["holds"] is True and "certainly worse than the base on 1" in one["claim"]


def test_a_repair_needs_a_regression():
  assert found(part("rte", "zero_shot", regressed(0.0, 0.2)))["regressions"]["holds"] is None
  assert found(part("rte", "zero_shot", regressed(-0.1, 0.2)))["regressions"]["holds"] is False
  assert found(part("rte", "zero_shot", regressed(0.1, 0.0)))["regressions"]["holds"] is None


def test_what_counts_as_a_set():
  good = regressed(0.1, 0.1)
  hidden = regressed(0.9, 0.9) | {"is_shown": False}
  perplexity = regressed(0.9, 0.9, better=-1)
  parts = [
    part("lambada", "harness", perplexity, hidden, good),
    part("sst", "few_shot", regressed(0.9, 0.9)),  # the first prompt decides
    part("sst", "zero_shot", good),
    part("rte", "zero_shot", regressed(0.9, 0.9, groups=9)),  # too few
    part("truthful_qa_mc", "qa", regressed(0.9, 0.9)),
  ]
  for order in itertools.permutations(parts):
    one = found(*order)["regressions"]
    assert one["measured"]["PPO − base"] == pytest.approx(-10)
    assert "on 2 public NLP sets" in one["claim"]


def test_regressions_need_all_three_models():
  gaps = {("base", "ppo"): (-0.1, -0.2, -0.05)}
  assert found(part("rte", "zero_shot", metric("accuracy", gaps))) == {}
