"""Rollouts whose answers end on their own: against expectations in closed form and figures worked out by hand."""

import math

import numpy as np
import pytest

from configs import models
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from instructjax.stages import lineage
from launch import lengths


def test_the_mean_is_that_of_lengths_cut_at_the_limit():
  # With one or two tokens, a mean of 1.25 is a quarter of twos.
  assert lengths.go_on_probability(1.25, 2) == pytest.approx(0.25)
  go_on = lengths.go_on_probability(200.0, 1024)
  rng = np.random.default_rng(0)
  drawn = np.minimum(rng.geometric(1 - go_on, 200_000), 1024)
  assert drawn.mean() == pytest.approx(200.0, rel=0.01)
  assert lengths.draw(200.0, 1024, (200_000,), 0).mean() == pytest.approx(200.0, rel=0.01)
  assert set(lengths.draw(None, 8, (4,), 0)) == set(lengths.draw(8.0, 8, (4,), 0)) == {8}
  assert set(lengths.draw(1.0, 8, (4,), 0)) == {1}


def load(**ppo):
  config = models.get("ppo_ptx", "gpt3_125m")
  config.ppo.update({"batch_size": 512, "num_minibatches": 8} | ppo)
  return config


def work(config, shards: int, *means):
  config = from_config_dict(config)
  return lengths.work(config, lineage.variant(config, "ppo_ptx"), shards, lengths.Means(*means))


@pytest.mark.parametrize("mean", [20.0, 200.0, 1.0])
def test_all_at_once_take_the_longest(mean):
  go_on = lengths.go_on_probability(mean, 1024)
  # The sum over k of the probability that some answer is longer than k; its first token takes no step.
  longest = sum(1 - (1 - go_on**k) ** 512 for k in range(1024))
  found = work(load(), 4, None, mean)
  assert found.steps == {512: pytest.approx(longest - 1, rel=0.1, abs=1e-6)}
  # Loops of 256 tokens; the first has a step less, and the last ones may not be reached.
  turns = [found.turns(f"jit(step)/rollout/decode_{stop}/while") for stop in (256, 512, 768, 1024)]
  assert sum(turns) == pytest.approx(found.steps[512]) and turns[0] == min(255, found.steps[512])
  assert found.turns("jit(step)/while") is None and found.scored is found.trained is None


def test_without_a_mean_it_is_the_bound():
  assert work(load(), 4).steps == {512: 1023}
  config = load()
  config.rollout.slots = 128
  found = work(config, 32)
  # Four to a shard: four rounds of them, and nothing is left for the narrower loop of two.
  assert dict(found.steps) == {128: 4 * 1023, 64: 0} and found.prefills == (128, 4)
  assert found.turns("jit(step)/rollout/slots/while") == 4
  assert found.turns("jit(step)/rollout/slots/while/body/refill/while") == 4  # a row each
  assert found.turns("jit(step)/rollout/slots/while/body/refill/while/body/stage/while") == 1 / 4
  assert found.turns("jit(step)/rollout/slots/while/body/decode/while") == 1023
  assert found.turns("jit(step)/rollout/decode_2/while") == 0


def test_a_rollout_in_slots_by_hand():
  # Two slots. Rows 0 and 1 run 4 and 1 steps; 2 follows on 1 at once, for 2 steps; 3 follows on 2, for 5.
  found = lengths.in_slots(np.array([[5, 2, 3, 6]]), 2)
  assert found == lengths.Turns(rounds=3, refills=4, stages=2, steps={2: 1 + 2 + 5})
  # Four slots of a shard become two when no row waits and two are free: after 3 steps. The longest has 7 more.
  found = lengths.in_slots(np.array([[2, 4, 4, 11]]), 4)
  assert found.steps == {4: 3, 2: 7} and (found.rounds, found.refills, found.stages) == (1, 4, 1)
  # A shard waits for the other: the first refills at 1 and 2, and the second goes on beside it.
  found = lengths.in_slots(np.array([[2, 2, 2], [4, 4, 4]]), 1)
  assert found.steps == {1: 9}


def test_refilled_slots():
  # One slot takes all answers one after the other, 16 of them each a sixteenth and something for the end.
  config = load(batch_size=64)
  config.rollout.slots = 1
  assert sum(work(config, 1, None, 20.0).steps.values()) == pytest.approx(64 * 19, rel=0.2)
  config.rollout.slots = 4
  found = sum(work(config, 1, None, 20.0).steps.values())
  assert 0.7 * 16 * 19 < found < 1.5 * (16 * 19 + 4 * 20)


def test_rows_of_several_episodes():
  config = load(packed_rows=8)
  config.data.update(max_prompt_length=256, max_response_length=256)
  config.ppo.update(batch_size=64, num_minibatches=2)
  # Without means an episode fills a row: as many chunks of 8 rows as without packing.
  found = work(config, 8)
  assert dict(found.scored) == {512: 8, 128: 0} and dict(found.trained) == {512: 4, 128: 0}
  # Of at most 2 tokens each, all 64 lie in one chunk of 32 narrow rows, and so do 32.
  found = work(config, 8, 1.0, 1.0)
  assert dict(found.scored) == {512: 0, 128: 1} and dict(found.trained) == {512: 0, 128: 1}
  assert found.turns("jit(step)/score/rows_of_128/while") == 1
  assert found.turns("jit(step)/while/body/update/value/rows_of_512/while") == 0


@pytest.mark.parametrize("mean", [0.5, 1025.0, math.nan])
def test_what_is_no_mean(mean):
  words = f"--mean_response={mean:g} must be from 1 to config.data.max_response_length=1024"
  with pytest.raises(ValueError, match=words):
    lengths.require_mean("response", mean, 1024)
  for possible in (None, 1.0, 1024.0):
    lengths.require_mean("response", possible, 1024)


def test_prompts_that_answers_share_are_refused():
  config = load(packed_rows=8, samples_per_prompt=4, batch_size=64, share_prompts=True)
  assert work(config, 1).scored  # a TPU's splash has no use for it
  config.execution.attention = "plain"
  with pytest.raises(UserError, match="share_prompts is not known to the planner"):
    work(config, 1)
  # A device with two rows of its own has no room for four answers to a prompt, so it shares none.
  assert work(config, 4).scored
