"""The order of the paper in samples that are made up for it."""

import csv
import json

import pytest

from benchmarks import published_samples as program

# Share of right answers of each model's ten samples at 175B; two sizes know nothing.
RIGHT = {"gpt": 9, "ppo-ptx": 7, "ppo-noptx": 2, "sft": 5}


def write(path, right, row):
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, ["model_type", *row(True)])
    writer.writeheader()
    for model, count in right.items():
      for size in program.SIZES:
        for i in range(10):
          writer.writerow({"model_type": f"{model}-{size}", **row(size == "175b" and i < count)})


@pytest.mark.parametrize(("ppo", "code"), [(2, 0), (8, 1)])
def test_the_order_decides(tmp_path, capsys, monkeypatch, ppo, code):
  monkeypatch.setattr(program, "FILES", {n: program.FILES[n] for n in list(program.FILES)[:3]})
  squad = lambda is_right: {
    "prompt_type": "fewshot",
    "ref_text": "the North Sea|North Sea" if is_right else "Not in background.",
    "sample": "North Sea",
  }
  truthful = lambda is_right: {"prompt_type": "QA prompt", "true": 0.9 * is_right, "info": 0.6}
  write(tmp_path / "squadv2_samples.csv", RIGHT | {"ppo-noptx": ppo}, squad)
  write(
    tmp_path / "truthful_qa_samples.csv",
    {m: 10 - n for m, n in RIGHT.items()} | {"ppo-ptx": 6, "sft": 3},
    truthful,
  )
  assert program.main([str(tmp_path)]) == code
  printed = capsys.readouterr()
  first, second, last = map(json.loads, printed.out.splitlines())
  assert first["squadv2_samples.csv"]["fewshot"]["GPT"] == [0, 0, 90]
  assert second["truthful_qa_samples.csv"]["QA prompt"]["PPO"] == [0, 0, 0.8]
  assert last == {"squadv2 as in the paper": code == 0, "truthful_qa as in the paper": True}
  assert "drop_samples.csv is not there" in printed.err
