"""What the command `rewards` does: scores ranked answers with reward models, and shows how good these are.

Called by commands/rewards.py. What is measured is in reward_models.py.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from instructjax.core import places, terminal
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError, writing
from instructjax.data.tokenizer import Tokenizer
from instructjax.evaluation import language_model, model_flag, ranked_files, reward_models
from instructjax.evaluation.resampling import shown
from instructjax.parallel import sharding

_SHARES = {
  "accuracy": "accuracy",
  "longer_wins": "longer is preferred",
  "follows_length": "longer scores higher",
  "length_matched": "accuracy, like length",
  "shorter_wins": "accuracy, shorter preferred",
}


def run(models: Sequence[str], data: Sequence[str], *, out: str, bootstrap: int, seed: int):
  """Measures all models on all data; writes rewards.json and the scores, and prints tables.

  Args:
    models: NAME=PATH of reward models.
    data: sources of rankings, or rewardbench2:FILE.
    out: folder of the results.
    bootstrap, seed: of the intervals.
  Raises:
    UserError: a value is wrong, a model or file cannot be read, or the results cannot be written.
  """
  paths = model_flag.parse(models, "rm=runs/demo/rm")
  if not data:
    raise UserError("--data must name rankings, as jsonl:FILE")
  if len(set(data)) < len(data):
    raise UserError("--data names a source twice")
  folder = pathlib.Path(places.require(out, "--out"))
  sources = [(spec, _read(spec)) for spec in data]
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=-1, fsdp=1, tensor=1), jax.devices())
  results: dict[str, dict[str, Any]] = {}
  for name, path in paths.items():
    with terminal.loading():
      model = language_model.open_reward_model(path, mesh)
    score = lambda pairs, model=model: language_model.rewards(model, pairs)
    results[name] = {}
    for number, (spec, rows) in enumerate(sources, start=1):
      scores = folder / f"scores-{name}-{number}.jsonl"
      found = evaluate(rows, model.tokenizer, score, scores, bootstrap=bootstrap, seed=seed)
      results[name][spec] = found
  with writing(folder):
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (folder / "rewards.json").write_text(text, encoding="utf-8")
  for table in tables(results):
    terminal.show(table)
  terminal.say(f"written: {folder / 'rewards.json'}")


def _read(spec: str) -> Sequence:
  if not spec.startswith(ranked_files.REWARDBENCH):
    return ranked_files.rankings(spec, "--data")
  path = places.require(spec.removeprefix(ranked_files.REWARDBENCH), "--data")
  return ranked_files.rewardbench_rows(pathlib.Path(path))


def evaluate(
  rows: Sequence,
  tokenizer: Tokenizer,
  score: ranked_files.Score,
  path: pathlib.Path,
  *,
  bootstrap: int,
  seed: int,
) -> dict[str, Any]:
  """What a reward model is on one source; `rows` are rankings, or rows of RewardBench 2.

  Args:
    rows: what is scored.
    tokenizer: the model's.
    score: (prompt, answer) pairs -> scores.
    path: where the scores of rankings are written.
    bootstrap, seed: of the intervals.
  Raises:
    UserError: an answer is too long for the model, or the file cannot be written.
  """
  if isinstance(rows[0], dict):
    entries = ranked_files.scored_entries(rows, tokenizer, score)
    return {"rewardbench2": reward_models.rewardbench2(entries)}
  items = ranked_files.scored(rows, tokenizer, score)
  with writing(path):
    ranked_files.write_scores(path, items)
  return reward_models.table(items, bootstrap=bootstrap, seed=seed)


def tables(results: Mapping[str, Mapping[str, Any]]) -> list:
  """The tables to show: one of all sources and labelers, one of best-of-n and ties."""
  rows, tests, benches = [], [], []
  for name, by_source in results.items():
    for spec, found in by_source.items():
      if "rewardbench2" in found:
        benches += [
          [f"{name}: {key}", f"{value:.4f}"] for key, value in found["rewardbench2"].items()
        ]
        continue
      labelers = {f"labeler {who}": row for who, row in found["labelers"].items()}
      for who, row in ({spec: found["all"]} | (labelers if len(labelers) > 1 else {})).items():
        rows.append(
          [
            f"{name}: {who}",
            str(row["pairs"]),
            *(shown(row[key]) for key in _SHARES),
            f"{row['expected_error']:.3f}" if "expected_error" in row else "",
          ]
        )
      for count, best in found["best"].items():
        tests.append(
          [f"{name}: best of {count}", shown(best["share"]), f"chance {best['chance']:.2f}"]
        )
      if found["ties"]:
        tests.append(
          [f"{name}: equally best answers above all others", shown(found["ties"]["above"]), ""]
        )
        tests.append([f"{name}: and by more than they differ", shown(found["ties"]["clear"]), ""])
      if found["agreement"]:
        tests.append(["labelers agree with each other", shown(found["agreement"]), ""])
  result = []
  if rows:
    columns = ["reward model", "pairs", *_SHARES.values(), "calibration error"]
    title = "shares of pairs [95% interval over prompts]"
    result.append(terminal.Table(columns=columns, rows=rows, title=title))
  if tests:
    result.append(terminal.Table(columns=["test", "share", "beside"], rows=tests))
  if benches:
    result.append(terminal.Table(columns=["RewardBench 2", "score"], rows=benches))
  return result
