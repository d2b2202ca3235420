"""Compares the scores of `instructjax rewards` with those of the package rewardbench, on an exported reward model.

  python -m instructjax rewards --models=rm=RUN/rm --data=jsonl:FILE --out=DIR
  python -m instructjax export --checkpoint=RUN/rm --format=hf --out=HF
  python benchmarks/peers/rewardbench_scores.py HF DIR/scores-rm-1.jsonl

The last command needs rewardbench, torch and transformers. Of rewardbench it runs the pipeline that scores texts, on
the CPU in place of the GPU that it asks for.
"""

import importlib.util
import json
import pathlib
import statistics
import sys

import transformers

BATCH = 64


def pipeline_class():
  """rewardbench's pipeline alone: the package's other modules import what is not needed here."""
  for folder in sys.path:
    path = pathlib.Path(folder) / "rewardbench" / "models" / "pipeline.py"
    if path.is_file():
      spec = importlib.util.spec_from_file_location("rewardbench_pipeline", path)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      return module.RewardBenchPipeline
  raise SystemExit("rewardbench is not installed")


def main(folder: str, scores: str):
  rows = [json.loads(line) for line in pathlib.Path(scores).read_text().splitlines()]
  transformers.BatchEncoding.to = lambda self, device: self  # it says "cuda"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
  if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
  model.config.pad_token_id = tokenizer.pad_token_id
  pipe = pipeline_class()("text-classification", model, tokenizer)
  texts = [
    row["prompt"] + answer + tokenizer.eos_token for row in rows for answer in row["responses"]
  ]
  theirs = []
  for start in range(0, len(texts), BATCH):
    theirs += pipe(texts[start : start + BATCH]).flatten().tolist()
  ours = [score for row in rows for score in row["scores"]]
  # A Hugging Face classifier of this family has no bias, which takes the demonstrations' mean away from our scores.
  differences = [a - b for a, b in zip(ours, theirs, strict=True)]
  shift = statistics.median(differences)
  gap = max(abs(difference - shift) for difference in differences)
  print(
    f"{len(ours)} answers: scores differ by {shift:.4f}, which is the bias, and by at most {gap:.1e} beside it"
  )
  for name, values in (("instructjax", ours), ("rewardbench", theirs)):
    rest, right, pairs = iter(values), 0.0, 0
    for row in rows:
      own = [next(rest) for _ in row["responses"]]
      for i, rank in enumerate(row["ranks"]):
        for j, other in enumerate(row["ranks"]):
          if rank < other:
            right += (own[i] > own[j]) + 0.5 * (own[i] == own[j])
            pairs += 1
    print(f"{name}: right on {right:g} of {pairs} pairs, {right / pairs:.4f}")


if __name__ == "__main__":
  main(*sys.argv[1:])
