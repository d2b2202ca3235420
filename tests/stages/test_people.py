"""Later rounds of comparisons go to people: asked once, waited for, taken when they have ranked, and never changed."""

import json
import types
from unittest import mock

import pytest

from instructjax.core import results
from instructjax.core.errors import UserError, Waiting
from instructjax.core.stages import STAGES
from instructjax.data import sources
from instructjax.data.records import Chat, Prompt
from instructjax.labels import filling, privacy, projects, rounds, schema, work
from instructjax.stages import answers, collect, context, lineage, people, pipeline
from tests import finished_run, micro
from tests.labels import app

STAGE = "collect_2"


class Run:
  """A run that stands before its second round, on a project with one item that people have ranked."""

  def __init__(self, tmp_path, **changes):
    self.place = str(tmp_path / "p")
    self.folder = tmp_path / "run" / STAGE
    self.database = app.make_project(self.place, [app.item("old")])
    self.done, self.sampled = [], 0
    specs = dict(data__comparisons=f"labels:{self.place}", collect__rounds=2)
    self.config = micro.config("ppo_ptx", {}, **specs | changes)
    self.records = records = {
      "train": [
        Prompt("a", "f:1"),
        Prompt("b", "f:2", "u7"),
        Prompt("a", "f:3"),
        Prompt("long" * 99, "f:4"),
      ],
      "validation": [Prompt("<chat>", "g:1")],
    }
    raw = records | {"validation": [Prompt(Chat((("user", "c"),)), "g:1")]}
    self.ctx = types.SimpleNamespace(
      config=self.config,
      workdir=tmp_path / "run",
      tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
      data=types.SimpleNamespace(
        records=lambda kind, split: records[split], raw_records=lambda kind, split: raw[split]
      ),
      data_seed=lambda stage: 3,
      directory=lambda stage: tmp_path / "run" / stage,
      done=lambda stage: self.done[-1] if self.done else None,
      contents=types.SimpleNamespace(
        of_written=lambda stage: types.SimpleNamespace(digests=("t", "v", "h"))
      ),
    )

  def sample(self, split, prompts, count):
    self.sampled += 1
    assert count == min(16 if split == "train" else 8, len(prompts))
    return [(one.prompt, [f"{one.prompt}{i}" for i in range(3)]) for one in prompts[:count]]

  def again(self, fingerprint="same"):
    run = types.SimpleNamespace(
      name=STAGE, directory=self.folder, fingerprint={"all": fingerprint}, files={}
    )
    finish = lambda ctx, stage, run, step, result: self.done.append(result)
    with mock.patch.object(people, "finish", finish):
      people.collect(self.ctx, STAGE, run, self.sample)

  def items(self):
    query = schema.items.select().where(schema.items.c.batch != "").order_by(schema.items.c.id)
    with self.database.read() as connection:
      return connection.execute(query).all()

  def rank(self, numbers, name="ann"):
    order = filling._answers(self.database)
    done = [
      filling.Done(
        n, name, {"answers": {str(a.id): {"rank": int(a.text[-1]) + 1} for a in order[n]}}
      )
      for n in numbers
    ]
    filling.record(self.database, done, 5000.0)

  def rows(self, name):
    return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_asks_once_waits_and_goes_on(tmp_path):
  run = Run(tmp_path)
  ann = app.user(run.database, "ann")
  app.submit(run.database, ann, work.next_item(run.database, ann, 1.0))  # which is of no round
  people.check(run.ctx)
  with pytest.raises(Waiting, match="3 rankings are missing of the 3 items .* 1 of them held out"):
    run.again()
  items = run.items()
  assert [(json.loads(item.prompt), item.split, item.author) for item in items] == [
    ("a", "train", ""),  # asked once, though it is there twice; what is too long is not asked
    ("b", "train", "u7"),
    ([{"role": "user", "content": "c"}], "validation", ""),
  ]
  assert {item.wanted for item in items} == {1}
  assert json.loads((run.folder / "asked.json").read_text())["batch"] == items[0].batch
  with run.database.read() as connection:
    origins = {row.origin for row in connection.execute(schema.answers.select())}
  assert f"{tmp_path}/run/ppo_ptx" in origins
  run.rank([items[0].id, items[1].id])
  with pytest.raises(Waiting, match=f"1 ranking is missing.*--project={run.place} --batch=run/"):
    run.again()
  run.rank([items[2].id])
  run.again()
  assert run.sampled == 2 and len(run.items()) == 3  # sampled for two splits, once
  (found,) = run.done
  assert found.agreement is None and found.files == {
    "train": "t",
    "validation": "v",
    "heldout": "h",
  }
  assert [(row["prompt"], row["labeler"]) for row in run.rows("train")] == [
    ("a", "ann"),
    ("b", "ann"),
  ]
  (row,) = run.rows("validation")
  assert row["prompt"] == [{"role": "user", "content": "c"}]
  assert dict(zip(row["responses"], row["ranks"])) == {f"<chat>{i}": i + 1 for i in range(3)}
  assert run.rows("heldout") == []


def test_a_run_that_dies_before_it_tells_the_project_asks_the_same(tmp_path):
  run = Run(tmp_path)
  with (
    mock.patch.object(people, "_put", side_effect=KeyboardInterrupt),
    pytest.raises(KeyboardInterrupt),
  ):
    run.again()
  before = (run.folder / "asked.json").read_text()
  with pytest.raises(Waiting):
    run.again()
  assert (run.folder / "asked.json").read_text() == before and run.sampled == 2
  texts = {
    answer.text for item in run.items() for answer in filling._answers(run.database)[item.id]
  }
  assert {text for row in json.loads(before)["rows"] for text in row["answers"]} == texts


def test_other_settings_do_not_take_what_was_asked_with_these(tmp_path):
  run = Run(tmp_path)
  with pytest.raises(Waiting):
    run.again()
  with pytest.raises(UserError, match="it was made with another all"):
    run.again("other")
  (run.folder / "asked.json").write_text("{}")
  with pytest.raises(UserError, match="was not written by a run. Delete"):
    run.again()


def test_more_people_may_be_wanted_while_it_waits(tmp_path):
  run = Run(tmp_path)
  with pytest.raises(Waiting):
    run.again()
  run.rank([item.id for item in run.items()])
  run.ctx.config = micro.config(
    "ppo_ptx", {}, data__comparisons=f"labels:{run.place}", collect__rounds=2, collect__wanted=2
  )
  with pytest.raises(Waiting, match="3 rankings are missing of the 3 items .* by 2 labelers each"):
    run.again()


def test_a_batch_that_is_closed_goes_on_with_what_there_is(tmp_path):
  run = Run(tmp_path)
  with pytest.raises(Waiting):
    run.again()
  first, _, last = run.items()
  rounds.close(run.database, first.batch, 1.0)
  with pytest.raises(UserError, match="people have ranked no training item of batch run/collect_2"):
    run.again()
  run.rank([first.id, last.id])
  run.again()
  assert [row["prompt"] for row in run.rows("train")] == ["a"]


def test_what_the_project_cannot_hold_is_said_before_anything_is_trained(tmp_path):
  assert (people.MOST_ANSWERS, people.LONGEST_USER) == (
    projects.MOST_ANSWERS,
    projects.LONGEST_AUTHOR,
  )
  run = Run(tmp_path)
  run.records["train"][0] = Prompt("a", "f:1", "u" * 81)
  with pytest.raises(UserError, match="f:1: user 'uuu.* must have at most 80 letters"):
    people.check(run.ctx)
  run.records["train"] = [Prompt("long" * 99, "f:1")]
  with pytest.raises(UserError, match="no train prompt has at most data.max_prompt_length tokens"):
    people.check(run.ctx)


def test_only_the_later_rounds_are_asked_of_people():
  specs = dict(data__comparisons="labels:p", collect__rounds=3)
  cfg = micro.config("ppo_ptx", {}, **specs)
  assert "collect" not in lineage.plan(cfg) and "collect_3" in lineage.plan(cfg)
  assert lineage.collected(cfg, "rm_3") == ("collect_2", "collect_3")
  assert lineage.contents(cfg, "rm_3")[-2:] == ("collect_2", "collect_3")
  assert "collect_2" not in lineage.contents(cfg, "rm")
  collect.check_settings(cfg, "collect_2")
  with pytest.raises(UserError, match="max_responses=10 must be at most 9"):
    many = micro.config("ppo_ptx", {}, collect__max_responses=10, rm__max_responses=10, **specs)
    collect.check_settings(many, "collect_2")


RESULTS = {
  results.Nothing: results.Nothing(),
  results.Pretrained: results.Pretrained(1.0),
  results.Tuned: results.Tuned((results.Epoch(1, 1.0, 1.0),)),
  results.Selected: results.Selected(()),
  results.Evaluated: results.Evaluated({}),
  results.RewardModel: finished_run.reward_model(),
}


class WholeRun:
  """A run of two rounds whose trainings take no time, on a project of the demo task."""

  def __init__(self, tmp_path, monkeypatch):
    self.place, self.workdir = str(tmp_path / "p"), tmp_path / "run"
    self.database = app.make_project(self.place, people=())
    prompts = sources.load(
      "demo:", "prompts", "train", seed=0, validation_fraction=0.5, on_bad_record="raise"
    )
    projects.change(self.database, {"held_out": "0.3"})
    new = [app.item(one.prompt) for one in prompts[:20]]
    with self.database.write() as connection:
      projects.add_to(connection, new, 1.0)
    self.simulate(0)
    self.learned = {}
    monkeypatch.setattr(pipeline, "module", self.module)
    monkeypatch.setattr(collect, "_speaker", lambda ctx, stage: None)
    monkeypatch.setattr(answers, "sample", self.sample)
    own = dict(comparisons=f"labels:{self.place}", prompts="demo:")
    specs = micro.write_data(tmp_path / "data") | own
    self.config = micro.config("ppo_ptx", specs, collect__rounds=2)

  def simulate(self, seed):
    return filling.simulate(self.database, "demo:", "train", seed, 2.0)

  def module(self, stage):
    return collect if STAGES[stage].kind == "collect" else types.SimpleNamespace(run=self.train)

  def train(self, ctx, stage):
    run = context.stage_run(ctx, stage)
    if STAGES[stage].kind == "rm":
      found = [ctx.data.rankings(stage, split) for split in ("train", "validation")]
      self.learned[stage] = [[(one.prompt, one.responses) for one in part] for part in found]
    if not context.is_finished(run):
      context.finish(ctx, stage, run, None, RESULTS[STAGES[stage].result])

  def sample(self, ctx, model, params, tokens, key, *, temperature):
    return types.SimpleNamespace(text=[f"the lord is {i}." for i in range(len(tokens))])

  def go(self):
    with micro.one_device():
      pipeline.run(self.config, self.workdir)


def test_the_circle_with_simulated_labelers(tmp_path, monkeypatch):
  run = WholeRun(tmp_path, monkeypatch)
  with pytest.raises(Waiting, match="24 rankings are missing of the 24 items"):
    run.go()
  assert "rm" in run.learned and "rm_2" not in run.learned
  first = run.learned["rm"]
  # People go on with other items, and a researcher adds some, while the run waits.
  (extra,) = projects.add(run.database, [app.item("another one")], 3.0)
  ranks = {str(one.id): {"rank": 1} for one in filling._answers(run.database)[extra]}
  filling.record(run.database, [filling.Done(extra, "zed", {"answers": ranks})], 3.0)
  with pytest.raises(Waiting):
    run.go()
  assert run.simulate(1) == (24, 0)
  run.go()
  assert run.learned["rm"] == first
  train, held_out = run.learned["rm_2"]
  assert train[: len(first[0])] == first[0] and held_out[: len(first[1])] == first[1]
  assert len(train) + len(held_out) == len(first[0]) + len(first[1]) + 24
  # A prompt that the project holds out is held out of the later round too, wherever the run has it.
  assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}
  assert all(text.startswith("the lord is") for _, texts in train[-8:] for text in texts)
  # Once more nothing changes, whatever happens in the project.
  before = (run.workdir / "evaluate" / "done.json").read_text()
  privacy.delete(run.database, "zed", 9.0)
  projects.add(run.database, [app.item("one more")], 9.0)
  run.go()
  assert (run.workdir / "evaluate" / "done.json").read_text() == before
