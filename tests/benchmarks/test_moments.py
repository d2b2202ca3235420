"""Moments of a run: what it has written, and where a fault falls."""

import random

from benchmarks import moments

ROWS = (
  (1.0, "tokenizer"),
  (2.0, "sft"),
  (3.0, "sft/line 1"),
  (3.5, "sft/save 1"),
  (4.0, "sft/done.json"),
  (5.0, "ppo_ptx"),
  (6.0, "ppo_ptx/done.json"),
  (8.0, "report"),
)
TIMELINE = moments.Timeline(ROWS, 10.0)


def test_marks_are_what_a_run_has_written(tmp_path):
  assert moments.marks(tmp_path) == set()
  sft = tmp_path / "sft"
  for name in ("checkpoints/2", "checkpoints/4.orbax-checkpoint-tmp"):
    (sft / name).mkdir(parents=True)
  (tmp_path / "compiled").mkdir()
  (sft / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
  (sft / "events.out.tfevents.1").touch()
  lines = {f"sft/line {number}" for number in (1, 2)}
  assert moments.marks(tmp_path) == {"sft", "sft/save 2", "sft/save 4"} | lines
  ((stage, inode),) = moments.saving(tmp_path)
  assert stage == "sft" and inode == (sft / "checkpoints/4.orbax-checkpoint-tmp").stat().st_ino


def test_a_moment_has_come_with_its_mark_or_a_later_one():
  moment = TIMELINE.at(3.2)
  assert (moment.last, round(moment.delay, 6)) == (2, 0.2)
  assert not TIMELINE.has_come(moment, {"tokenizer", "sft"})
  assert TIMELINE.has_come(moment, {"sft/line 1"})
  assert TIMELINE.has_come(
    moment, {"sft/save 1"}
  )  # the line was dropped, or the checkpoint is another one
  first = TIMELINE.at(0.5)
  assert (first.last, first.delay) == (-1, 0.5) and TIMELINE.has_come(first, ())


def test_moments_fall_into_saves_the_last_stages_and_anywhere():
  rng = random.Random(0)
  drawn = [TIMELINE.draw(rng) for _ in range(3000)]
  saves = sum(ROWS[moment.last][1] == "sft/save 1" and moment.delay < 0.04 for moment in drawn)
  late = sum(moment.seconds >= 3.5 and moment.delay > 0.04 for moment in drawn)
  early = sum(moment.seconds < 1 for moment in drawn)
  assert abs(saves / 3000 - 1 / 3) < 0.05
  assert abs(late / 3000 - (1 / 6 + 0.5 * 0.65)) < 0.05
  assert abs(early / 3000 - 0.5 * 0.1) < 0.02
  assert all(1 <= TIMELINE.draw_joined(rng).seconds <= 10 for _ in range(100))


def test_the_stage_is_that_of_the_last_mark_or_the_next():
  assert TIMELINE.stage(set()) == "start"
  assert TIMELINE.stage({"tokenizer", "sft", "sft/line 1"}) == "sft"
  assert TIMELINE.stage({"sft/done.json", "sft"}) == "ppo_ptx"
  assert TIMELINE.stage({"ppo_ptx/done.json"}) == "report"
