"""Which files are mirrored, and in which order, told from names; that copies follow it: test_mirror.py."""

import pytest

from instructjax.train import mirrored_files


@pytest.mark.parametrize(
  ("name", "folder", "whole"),
  [
    ("sft/metrics.jsonl", "", True),
    ("sft/checkpoints/6/params/0", "6", True),
    ("sft/checkpoints/9/params/0", "9", False),
    # Another stage's step of the same number has one.
    ("rm/checkpoints/6/params/0", "6", False),
    ("sft/checkpoints", "", True),
  ],
)
def test_a_file_belongs_to_a_checkpoint_which_is_whole_with_its_manifest(name, folder, whole):
  there = {"sft/checkpoints/6/manifest.json", "rm/checkpoints/9/manifest.json"}
  assert mirrored_files.step(name) == folder
  assert mirrored_files.is_whole(name, there) is whole


def test_what_says_that_others_are_whole_is_removed_first():
  names = ["a/metrics.jsonl", "a/done.json", "a/checkpoints/3/manifest.json", "a/checkpoints/3/x"]
  assert [name for name in names if mirrored_files.is_marker(name)] == names[1:3]
  assert sorted(names, key=mirrored_files.comes_late) == [*names[1:3], names[0], names[3]]


def test_files_of_this_machine_and_half_written_ones_are_left_out(tmp_path):
  kept = ["done.json", "checkpoints/3/manifest.json", "checkpoints/3/params/0", "report/page.html"]
  left = [
    *("compiled/program", "cache/checksums.json", ".lock", ".mirrored.json", "owner.json"),
    *("report/page.html.tmp", "checkpoints/6.orbax-checkpoint-tmp/params"),
    # Without a manifest; and put aside because it is damaged.
    *("checkpoints/6/params/0", "checkpoints/3.damaged/manifest.json"),
  ]
  for name in (*kept, *left):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  found = [str(path.relative_to(tmp_path)) for path in mirrored_files.files(tmp_path)]
  assert sorted(found) == sorted(kept)
  assert list(mirrored_files.files(tmp_path / "deleted")) == []


def test_an_object_is_told_from_its_successor_by_the_best_that_a_file_system_has():
  assert mirrored_files.token({"etag": "e", "generation": 7, "size": 1}) == "7"
  assert mirrored_files.token({"mtime": 2.5}) == "2.5"
  assert mirrored_files.token({"size": 1}) == ""
