"""The rewards of the host in a run: what functions see of a rollout, resuming, and rewards that never vary."""

import dataclasses
import threading
import types

import numpy as np
import pytest

from instructjax.core import rewards
from instructjax.core.errors import StageStopped, UserError
from instructjax.stages import host_rewards
from instructjax.stages.reward_functions import Episodes, Function
from instructjax.train import stage_runs
from tests.parallel.store import teams

PAD, EOS = 9, 0
TOKENIZER = types.SimpleNamespace(
  pad_id=PAD, eos_id=EOS, stop_ids=(EOS,), decode=lambda ids: " ".join(map(str, ids))
)
# A prompt of one token and one of two; the first answer ends, the second is cut off.
TOKEN_BL = np.array([[PAD, 1, 5, EOS, PAD], [1, 2, 6, 7, 8]])
IS_RESPONSE_BR = np.array([[True, True, False], [True, True, True]])
LISTED = rewards.parse(("rm", "2*python:checks:polite", "format:x"), "config.ppo.rewards")


def test_what_functions_see_of_a_rollout():
  found = host_rewards.episodes_of(TOKENIZER, TOKEN_BL, IS_RESPONSE_BR, 3)
  assert found == Episodes(
    prompts=["1", "1 2"],
    answers=["5", "6 7 8"],
    ended=[True, False],
    prompt_ids=[[1], [1, 2]],
    answer_ids=[[5, EOS], [6, 7, 8]],
    iteration=3,
  )


def test_each_function_is_called_once_with_the_whole_batch():
  seen = []
  polite = lambda prompts, answers: seen.append((prompts, answers)) or [0.25, 0.5]
  long = lambda prompts, answers, iteration: [iteration, len(answers[1])]
  functions = Function(LISTED[1], polite), Function(LISTED[2], long, asks=("iteration",))
  rollout = types.SimpleNamespace(token_BL=TOKEN_BL, is_response_BR=IS_RESPONSE_BR)
  found = host_rewards.make("ppo", TOKENIZER, functions)(rollout, 4)
  assert seen == [(["1", "1 2"], ["5", "6 7 8"])]
  assert {name: value.tolist() for name, value in found.items()} == {
    "polite": [0.25, 0.5],
    "format": [4.0, 5.0],
  }


@pytest.mark.parametrize("is_right", [True, False])
def test_process_0_computes_and_all_others_learn_of_it_or_of_what_is_wrong(monkeypatch, is_right):
  calls, ends = [], {}
  value = 0.1 if is_right else float("nan")
  function = Function(LISTED[1], lambda *texts: calls.append(texts) or [value, 2.5])
  rollout = types.SimpleNamespace(token_BL=TOKEN_BL, is_response_BR=IS_RESPONSE_BR)
  here = threading.local()
  monkeypatch.setattr(host_rewards.distributed, "team", lambda: here.team)

  def one(team):
    here.team = team
    try:
      found = host_rewards.make("ppo", TOKENIZER, [function])(rollout, 4)
      ends[team.process] = found["polite"].tolist()
    except UserError as error:
      ends[team.process] = str(error)

  threads = [threading.Thread(target=one, args=(team,)) for team in teams(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  assert len(calls) == 1 and ends.keys() == {0, 1, 2}
  (end,) = {str(end) for end in ends.values()}
  assert end == str([float(np.float32(0.1)), 2.5]) if is_right else "returned nan for" in end


def test_the_trial_has_an_empty_answer():
  seen = []
  function = Function(LISTED[1], lambda *texts: seen.append(texts) or [0.0, 0.0])
  host_rewards.try_out([function], TOKENIZER, [[1, 2], [3]])
  assert seen == [(["1 2", "3"], ["3", ""])]
  fails = Function(LISTED[1], lambda prompts, answers: [1 / len(a) for a in answers])
  with pytest.raises(UserError) as error:
    host_rewards.try_out([fails], TOKENIZER, [[1, 2], [3]])
  assert "in a trial on two rows, raised ZeroDivisionError" in str(error.value)
  assert str(error.value).endswith(
    "for the answer '' to the prompt '3'. Mend the function and run the same command again"
  )


def stage_run():
  fields = dict.fromkeys(field.name for field in dataclasses.fields(stage_runs.StageRun))
  own = dict(name="ppo", fingerprint={"a": "1"}, files={})
  changeable = {"rounding": {}, "same numbers": {}, stage_runs.LIBRARIES: {}}
  return stage_runs.StageRun(**fields | own | dict(changeable=changeable))


def test_a_changed_function_is_in_the_fingerprint_and_is_told_on_resume():
  at = lambda checksum: Function(LISTED[1], len, files=("checks.py",), checksum=checksum)
  rule = Function(LISTED[2], len)
  plain = stage_run()
  assert host_rewards.with_sources(plain, {"a": "1"}, [rule]).fingerprint == {"a": "1"}
  before, now = (host_rewards.with_sources(plain, {"a": "1"}, [at(c), rule]) for c in ("aa", "bb"))
  assert before.fingerprint == {"a": "1", "reward python:checks:polite": "aa"}
  assert before.files == {"reward python:checks:polite": ("checks.py",)}
  assert stage_runs.changes(now, before.changeable) == [
    "ppo goes on with python:checks:polite changed: rewards may differ from those before"
  ]
  assert stage_runs.changes(before, before.changeable) == []


def watch(limit, records=()):
  watched = host_rewards.watch_constants("ppo", LISTED[:2], limit, records)

  def one(iteration, rm, polite):
    values = {"rm": np.array(rm), "polite": np.array(polite)}
    watched(iteration, values, lambda: (["a prompt"], ["an answer\n"]))

  return one


def test_a_reward_that_never_varies_stops_the_stage():
  one = watch(3)
  one(1, [0.0, 1.0], [0.5, 0.5])
  one(2, [0.0, 0.0], [0.7, 0.7])
  with pytest.raises(StageStopped) as error:
    one(3, [1.0, 1.0], [0.7, 0.7])
  assert str(error.value).startswith(
    "ppo stopped at step 3: the reward python:checks:polite has never told two answers of a batch apart; all of the"
    r" last batch have 0.7, as the answer 'an answer\n' to the prompt 'a prompt'."
  )


def test_a_reward_that_varied_once_may_be_constant():
  one = watch(2)
  one(1, [0.0, 1.0], [0.5, 0.6])
  for iteration in range(2, 9):
    one(iteration, [1.0, 1.0], [1.0, 1.0])
  # Also in an earlier process, of which metrics.jsonl tells.
  record = {"reward": 0.1, "reward_std": 0.3, "rewards/polite": 0.5, "rewards/polite/std": 0.5}
  watch(2, [record])(7, [1.0, 1.0], [1.0, 1.0])
  rounding = record | {"rewards/polite/std": 1e-8}
  with pytest.raises(StageStopped):
    watch(2, [rounding])(7, [1.0, 1.0], [1.0, 1.0])


def test_a_reward_that_is_only_logged_stops_nothing():
  listed = rewards.parse(("rm", "0*python:checks:polite"), "config.ppo.rewards")
  watched = host_rewards.watch_constants("ppo", listed, 2, ())
  watched(7, {"rm": np.array([0.0, 1.0]), "polite": np.array([1.0, 1.0])}, list)


def test_no_limit_and_batches_of_one_answer_never_stop():
  watch(0)(99, [1.0, 1.0], [1.0, 1.0])
  watch(2)(99, [1.0], [1.0])
