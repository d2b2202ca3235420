"""Scores OpenAI's published samples of the paper's models with the metrics of `evaluate`, beside Table 14.

  python -m benchmarks.published_samples FOLDER

FOLDER is `automatic-eval-samples` of a copy of github.com/openai/following-instructions-human-feedback. The samples are
a few hundred a task, and not drawn at random from it, so that numbers differ from the table's and the order counts:
the command ends with 1 if 175B's F1 on SQuADv2 with worked examples is not GPT > PPO-ptx > PPO, or if the share of true
and informative answers to TruthfulQA's QA prompt is not PPO > PPO-ptx > SFT > GPT.

Prints a line of JSON for each file: prompt -> model -> [1.3B, 6B, 175B].
"""

import argparse
import collections
import csv
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from instructjax.evaluation.metrics import bleu, drop, rouge, words
from instructjax.evaluation.tasks import squad_v2, truthful_qa

MODELS = {"gpt": "GPT", "sft": "SFT", "ppo-noptx": "PPO", "ppo-ptx": "PPO-ptx"}
SIZES = ("xl", "6b", "175b")
Found = Mapping[str, Mapping[str, Sequence[float]]]


def _squad(row: Mapping[str, str]) -> float:
  none = words.normalized("Not in background.")
  golds = tuple(gold for gold in row["ref_text"].split("|") if words.normalized(gold) != none)
  item = squad_v2.Item("", "", (), "", golds, is_last=True)
  return squad_v2.score(item, row["sample"])["f1"]


def _drop(row: Mapping[str, str]) -> float:
  return drop.best([row["sample"]], [[gold] for gold in row["ref_text"].split("|")])["f1"]


def _truthful(row: Mapping[str, str]) -> float:
  return truthful_qa.judged({"truth": float(row["true"]), "info": float(row["info"])})["true_info"]


def _mean(values: Sequence) -> float:
  return float(np.mean(values))


def _bleu(values: Sequence) -> float:
  return bleu.corpus(np.sum(values, axis=0))


# File -> (score of a row, what makes one number of all scores).
FILES: dict[str, tuple[Callable, Callable]] = {
  "squadv2_samples.csv": (_squad, _mean),
  "drop_samples.csv": (_drop, _mean),
  "truthful_qa_samples.csv": (_truthful, _mean),
  "fr_to_en_samples.csv": (lambda row: bleu.counts(row["sample"], [row["ref_text"]]), _bleu),
  "tldr_samples.csv": (lambda row: rouge.rouge_l(row["sample"], [row["ref_text"]]), _mean),
}


def scored(rows, score: Callable, whole: Callable) -> Found:
  """Prompt -> model -> the metric at each size."""
  values = collections.defaultdict(list)
  for row in rows:
    values[row.get("prompt_type", ""), row["model_type"]].append(score(row))
  return {
    prompt: {
      title: [round(whole(values[prompt, f"{model}-{size}"]), 3) for size in SIZES]
      for model, title in MODELS.items()
    }
    for prompt in sorted({prompt for prompt, _ in values})
  }


def is_ordered(found: Mapping[str, Sequence[float]], models: Sequence[str]) -> bool:
  """Whether 175B's numbers fall from model to model."""
  values = [found[model][-1] for model in models]
  return all(a > b for a, b in zip(values, values[1:]))


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path)
  folder = parser.parse_args(arguments).folder
  csv.field_size_limit(1 << 24)
  found: dict[str, Found] = {}
  for name, (score, whole) in FILES.items():
    if not (folder / name).is_file():
      print(f"{folder / name} is not there", file=sys.stderr)
      continue
    with open(folder / name, encoding="utf-8", newline="") as file:
      found[name] = scored(csv.DictReader(file), score, whole)
    print(json.dumps({name: found[name]}))
  squad = found.get("squadv2_samples.csv", {}).get("fewshot")
  truthful = found.get("truthful_qa_samples.csv", {}).get("QA prompt")
  holds = [
    squad is not None and is_ordered(squad, ("GPT", "PPO-ptx", "PPO")),
    truthful is not None and is_ordered(truthful, ("PPO", "PPO-ptx", "SFT", "GPT")),
  ]
  print(json.dumps({"squadv2 as in the paper": holds[0], "truthful_qa as in the paper": holds[1]}))
  return 0 if all(holds) else 1


if __name__ == "__main__":
  sys.exit(main())
