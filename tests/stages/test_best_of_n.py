"""Best-of-n: what is chosen, what is written, and how a stopped run goes on. Networks are stood in for."""

import json
import types

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.records import Chat, Prompt
from instructjax.stages import answers, best_of_n, lineage, policies
from tests import micro


def test_the_best_usable_answer_is_chosen_the_first_of_equals():
  score_PN = np.array([[1.0, 3, 2], [5, 5, 1], [9, 1, 2], [1, 2, 3]])
  usable_PN = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]], bool)
  np.testing.assert_array_equal(best_of_n.choose(score_PN, usable_PN), [1, 0, 2, -1])


def scored(texts):
  """A reward model that likes z: an answer's score is its number of them."""
  return np.array([float(text.count("z")) for text in texts], np.float32)


@pytest.fixture
def stage(tmp_path, monkeypatch):
  """stage(prompts, **changes) -> (run, sampled): runs the stage, and the parts that it has sampled so far."""
  monkeypatch.setattr(best_of_n, "_PROMPTS", 2)
  monkeypatch.setattr(best_of_n.jax.random, "fold_in", lambda key, number: number)
  monkeypatch.setattr(policies, "load", lambda ctx, name: f"weights of {name}")
  monkeypatch.setattr(policies, "load_reward", lambda ctx: "reward")
  sampled, finished = [], []
  monkeypatch.setattr(
    best_of_n, "finish", lambda ctx, stage, run, step, result: finished.append(result)
  )
  monkeypatch.setattr(best_of_n, "is_finished", lambda run: bool(finished))

  def sample(ctx, model, params, tokens, key, *, temperature, to_newline):
    sampled.append((key, params, to_newline, temperature))
    rng = np.random.default_rng(key)
    texts = ["".join(rng.choice(["a", "z"], 3)) for _ in tokens]
    return types.SimpleNamespace(text=texts, ended_N=rng.random(len(texts)) < 0.8)

  monkeypatch.setattr(answers, "sample", sample)
  monkeypatch.setattr(answers, "from_text", lambda ctx, prompts, text, ended_N: text)
  monkeypatch.setattr(answers, "score", lambda ctx, model, params, found: scored(found))

  def make(prompts, **changes):
    config = micro.config("best_of_n", {}, data__prompts="jsonl:p", **changes)
    run_ = types.SimpleNamespace(fingerprint={"config.best_of_n": str(changes)}, files={})

    monkeypatch.setattr(best_of_n, "stage_run", lambda ctx, stage: run_)
    ctx = types.SimpleNamespace(
      config=config,
      tokenizer=types.SimpleNamespace(
        encode=lambda text: list(text), bos_id=None, control_pattern=None,
        chats=types.SimpleNamespace(render_all=lambda chats: [chats[0][-1]["content"]]),
      ),
      data=types.SimpleNamespace(raw_records=lambda kind, split: [Prompt(p) for p in prompts]),
      directory=lambda name: tmp_path / name,
      data_seed=lambda name: 0,
      key=lambda name: "key",
      model=lambda role: role,
    )  # fmt: skip
    return lambda: best_of_n.run(ctx, "best_of_n"), sampled, finished

  return make


def rows_of(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_chosen_answers_are_demonstrations_with_their_scores(stage, tmp_path):
  prompts = [f"p{i}" for i in range(5)]
  run, sampled, finished = stage(prompts, best_of_n__n=4, best_of_n__policy="ppo_init")
  run()
  path = tmp_path / "best_of_n" / "answers.jsonl"
  rows = rows_of(path)
  assert {row["prompt"] for row in rows} == set(prompts)
  for row in rows:
    assert row["score"] == scored([row["response"]])[0] and len(row["scores"]) == 4
    assert row["score"] <= max(row["scores"])  # the best may have been cut off
  (result,) = finished
  assert (result.prompts, result.left_out) == (5, 0)
  assert result.reward == np.mean([row["score"] for row in rows]) > result.mean_reward
  assert result.kl == pytest.approx(np.log(4) - 3 / 4)
  assert [one.name for one in (tmp_path / "best_of_n").iterdir()] == ["answers.jsonl"]
  assert sampled == [(number, "weights of ppo_init", False, 1.0) for number in range(3)]
  # `sft` reads the file as a user's own.
  found = sources.load(
    f"jsonl:{path}", "demonstrations", "all", seed=0, validation_fraction=0.1, on_bad_record="raise"
  )
  assert [(r.prompt, r.response) for r in found] == [(r["prompt"], r["response"]) for r in rows]


def test_a_stopped_run_goes_on_and_writes_the_same(stage, tmp_path, monkeypatch):
  prompts = [f"p{i}" for i in range(6)]
  run, sampled, finished = stage(prompts, best_of_n__n=3)
  finish = best_of_n.finish

  def stop(*_):
    raise RuntimeError("stopped")

  monkeypatch.setattr(best_of_n, "finish", stop)
  with pytest.raises(RuntimeError, match="stopped"):
    run()
  path = tmp_path / "best_of_n" / "answers.jsonl"
  whole, sampled[:] = path.read_text(), []
  path.unlink()
  (tmp_path / "best_of_n" / "parts" / "000001.jsonl").unlink()
  (tmp_path / "best_of_n" / "parts" / "000002.jsonl.tmp").write_text("half a l")
  with pytest.raises(RuntimeError, match="stopped"):
    run()
  assert [number for number, *_ in sampled] == [1] and path.read_text() == whole
  run, *_ = stage(prompts, best_of_n__n=5)
  with pytest.raises(UserError, match="best_of_n"):
    run()
  (tmp_path / "best_of_n" / "parts" / "000001.jsonl").write_text("{")
  run, *_ = stage(prompts, best_of_n__n=3)
  with pytest.raises(
    UserError, match="000001.jsonl is damaged; delete it, and the run makes it again"
  ):
    run()
  (tmp_path / "best_of_n" / "parts" / "000001.jsonl").unlink()
  monkeypatch.setattr(best_of_n, "finish", finish)
  run()
  assert finished and path.read_text() == whole and not (tmp_path / "best_of_n" / "parts").exists()


def test_a_prompt_without_an_ended_answer_is_left_out(stage, tmp_path, monkeypatch):
  run, _, finished = stage(["p0", "p1"], best_of_n__n=2)
  ended = np.array([False, False, True, False])
  sample = lambda *a, **k: types.SimpleNamespace(text=["z", "z", "a", "zz"], ended_N=ended)
  monkeypatch.setattr(answers, "sample", sample)
  run()
  (row,) = rows_of(tmp_path / "best_of_n" / "answers.jsonl")
  assert (row["response"], row["score"], row["scores"]) == ("a", 0, [0, 2])
  assert (finished[0].prompts, finished[0].left_out) == (1, 1)
  finished[:], ended[:] = [], False
  with pytest.raises(UserError, match="none of the 2 answers to each of 2 prompts ended by itself"):
    run()


def test_chats_stay_messages_and_too_many_prompts_are_refused(stage):
  chat = Chat((("user", "hi"),))
  assert best_of_n.as_demonstration(chat, "ho") == {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
  }
  run, *_ = stage(["a", "b" * 99, chat], best_of_n__num_prompts=3)
  with pytest.raises(
    UserError, match=r"num_prompts=3 must not exceed the 2 training prompts of .*; 0 is all"
  ):
    run()


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_which_weights_of_an_rl_policy_answered_is_part_of_the_stage(which):
  assert "evaluate" not in lineage.blocks(micro.config("best_of_n", {}), "best_of_n")
  config = micro.config(
    "best_of_n",
    {},
    best_of_n__policy="ppo",
    evaluate__weights=which,
    ppo__ema_decay=0.5,
  )
  assert lineage.blocks(config, "best_of_n")["evaluate"] == {"weights": which}


@pytest.mark.parametrize(
  ("policy", "parents"),
  [("sft", ("sft_select", "rm")), ("ppo_ptx", ("ppo_ptx", "rm")), ("base", ("pretrain", "rm"))],
)
def test_it_comes_from_its_policy_and_the_reward_model(policy, parents):
  config = micro.config("best_of_n", {}, best_of_n__policy=policy)
  assert lineage.parents(config, "best_of_n") == parents
  assert lineage.plan(config)[-1] == "best_of_n" and set(parents) <= set(lineage.plan(config))
