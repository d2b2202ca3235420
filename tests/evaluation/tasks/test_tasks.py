"""All tasks: what each must have, and that a file of its own is all that a new one needs."""

import re

import pytest

from instructjax.evaluation import tasks

FOUND = tasks.found()


@pytest.mark.parametrize("name", FOUND)
def test_a_task_is_whole(name):
  task = FOUND[name]
  keys = [metric.key for metric in task.metrics]
  assert task.title and task.files and len(set(keys)) == len(keys)
  for prompt, how in task.prompts.items():
    assert re.fullmatch(r"[a-z0-9_]+", prompt), "it becomes a file's name"
    assert how.metrics and set(how.metrics) <= set(keys)
  assert set(task.judges) <= set(tasks.JUDGES)


def test_a_task_is_found_by_its_file(tmp_path, monkeypatch):
  source = "from instructjax.evaluation.tasks.piqa import TASK as PIQA\nTASK = PIQA\n"
  (tmp_path / "my_task.py").write_text(source)
  monkeypatch.setattr(tasks, "__path__", [str(tmp_path)])
  tasks.found.cache_clear()
  try:
    assert list(tasks.found()) == ["my_task"]
  finally:
    tasks.found.cache_clear()
