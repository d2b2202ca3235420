"""All tasks: what each must have, and that a file of its own is all that a new one needs."""

import re

import pytest

from instructjax.evaluation import rows, tasks

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


# As their publishers name them, or Hugging Face's hub.
PUBLISHED = {
  "winogender": ("all_sentences.tsv", "winogender-schemas/data/all_sentences.tsv"),
  "crows_pairs": ("crows_pairs_anonymized.csv",),
  "real_toxicity": (
    "realtoxicityprompts-data/prompts.jsonl",
    "real-toxicity-prompts/prompts.jsonl",
  ),
  "truthful_qa": ("TruthfulQA.csv", "truthful_qa/generation/validation-00000-of-00001.parquet"),
  "truthful_qa_mc": (
    "mc_task.json",
    "truthful_qa/multiple_choice/validation-00000-of-00001.parquet",
  ),
  "hellaswag": ("hellaswag_val.jsonl", "hellaswag/data/hellaswag_val.jsonl"),
  "rte": ("RTE/val.jsonl", "RTE/dev.tsv"),
  "wsc": ("WSC/val.jsonl",),
  "sst": ("SST-2/dev.tsv",),
  "squad_v2": ("dev-v2.0.json", "squad_v2/validation-00000-of-00001.parquet"),
  "quac": ("val_v0.2.json",),
  "drop": ("drop_dataset/drop_dataset_dev.json", "drop/validation-00000-of-00001.parquet"),
  "piqa": ("piqa/validation-00000-of-00001.parquet",),
  "boolq": ("BoolQ/val.jsonl",),
  "copa": ("COPA/val.jsonl",),
  "winogrande": ("winogrande_1.1/dev.jsonl",),
  "lambada": ("lambada_test.jsonl", "lambada_openai/test-00000-of-00001.parquet"),
  "arc_easy": ("ARC-Easy/ARC-Easy-Test.jsonl", "ARC-Easy/test-00000-of-00001.parquet"),
  "arc_challenge": ("ARC-Challenge/ARC-Challenge-Test.jsonl",),
}


@pytest.mark.parametrize(("name", "path"), [(n, p) for n, ps in PUBLISHED.items() for p in ps])
def test_published_files_are_found_by_their_task_alone(tmp_path, name, path):
  (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / path).write_text("")
  data = rows.Data((str(tmp_path),), {}, False)
  found = {other: rows.find(data, other, task, train=False) for other, task in FOUND.items()}
  assert {other for other, spec in found.items() if spec} == {name}


def test_a_task_is_found_by_its_file(tmp_path, monkeypatch):
  source = "from instructjax.evaluation.tasks.piqa import TASK as PIQA\nTASK = PIQA\n"
  (tmp_path / "my_task.py").write_text(source)
  monkeypatch.setattr(tasks, "__path__", [str(tmp_path)])
  tasks.found.cache_clear()
  try:
    assert list(tasks.found()) == ["my_task"]
  finally:
    tasks.found.cache_clear()
