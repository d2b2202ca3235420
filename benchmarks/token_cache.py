"""Measures the token cache: memory and seconds until the first batches, in a first and in a second start.

  python -m benchmarks.token_cache --tokens=20_000_000
  python -m benchmarks.token_cache --tokens=20_000_000 --whole

Prints one JSON line. The text is made of words that are drawn by Zipf's law, in documents of 30 to 800 words, and the
tokenizer is one that is trained on it, as a run without a given tokenizer trains. Each start is a process of its own
that does what stage `pretrain` does before its first step: it makes the data of a run, opens batches of 32 rows of
2,048 tokens and draws 20 of them. No network is built, so that memory is that of the data.

  tokens_per_s: tokens that one core makes of text, in the first start.
  seconds: from the start of the process's work, after imports, until the first batch is there; CPU seconds beside it.
  resident: bytes that the process holds beyond those it held before, when the batches are drawn; by token, too.
  disk: bytes of the cache a token.

With --whole the starts are those of the main command, which trains for two steps of the preset tiny with two rows of
2,048 tokens: process start, imports, tokenizer, compilation and the first step included. The second run has a workdir
of its own and shares the first one's token cache; it finds no compiled programs.

  first_step_s: seconds from the command's start until it has written the metrics of its first step.
  peak: most memory that the process held, the network's and its compilation's included.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

LENGTH, BATCH, DRAWN = 2048, 32, 20
_WORDS, _TEXTS = 20_000, 2000


def write_text(path: pathlib.Path, tokens: int):
  """Writes documents of about so many tokens as JSON lines."""
  rng = random.Random(0)
  letters = "etaoinshrdlucmfwypvbgk"
  words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(_WORDS)]
  weights = [1 / (rank + 10) for rank in range(_WORDS)]
  cumulative, written = [], 0.0
  for weight in weights:
    written += weight
    cumulative.append(written)
  # Drawing words takes longer than tokenizing them, so there are a few texts only, each begun with its number.
  texts = [
    " ".join(rng.choices(words, cum_weights=cumulative, k=rng.randint(30, 800)))
    for _ in range(_TEXTS)
  ]
  made = number = 0
  with open(path, "w") as file:
    while made < tokens:
      text = f"{number} {texts[number % _TEXTS]}"
      made += len(text) // 4  # near enough: what is counted is what the tokenizer makes
      number += 1
      file.write(json.dumps({"text": text}) + "\n")


def resident() -> int:
  """Bytes of memory that this process holds."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmRSS:")[1].split()[0]) * 1024


def start(folder: pathlib.Path) -> dict:
  """What one start does; see the top."""
  from configs import models
  from instructjax.core.config import from_config_dict
  from instructjax.data import batching
  from instructjax.data import tokenizer as tokenizers
  from instructjax.parallel import memory
  from instructjax.stages.contents import Contents
  from instructjax.stages.run_data import RunData

  values = models.get("pretrain", "tiny")
  values.data.documents = f"jsonl:{folder / 'text.jsonl'}"
  config = from_config_dict(values)
  tokenizer = tokenizers.load(folder / "tokenizer.model")
  memory.release_freed_memory()
  before, wall, cpu = resident(), time.perf_counter(), time.process_time()
  data = RunData(config, folder / "run", tokenizer, Contents(config, folder / "run"))
  store = data.tokens("documents", "train").store()
  tokenized = time.process_time() - cpu
  batches = batching.packed_batches(data.document_rows("train", LENGTH), batch_size=BATCH, seed=0)
  batch = next(batches)
  found = {
    "seconds": round(time.perf_counter() - wall, 2),
    "cpu_seconds": round(time.process_time() - cpu, 2),
    "tokens": store.num_tokens,
    "rows": batches.steps_per_epoch * BATCH,
    "tokens_per_s": round(store.num_tokens / tokenized),
  }
  cpu = time.process_time()
  for _ in range(DRAWN):
    batch = next(batches)
  found["ms_per_batch"] = round((time.process_time() - cpu) / DRAWN * 1000, 2)
  found["filled"] = round(float((batch.segment_BL > 0).mean()), 4)
  memory.release_freed_memory()
  found["resident"] = resident() - before
  found["resident_per_token"] = round(found["resident"] / store.num_tokens, 3)
  found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
  return found


def whole(folder: pathlib.Path, name: str) -> dict:
  """Runs the main command for two steps; see the top."""
  workdir = folder / name
  settings = {
    "data.documents": f"jsonl:{folder / 'text.jsonl'}",
    "data.token_cache": folder / "tokens",
    "tokenizer.path": folder / "tokenizer.model",
    "tokenizer.vocab_size": json.loads((folder / "about.json").read_text())["vocab_size"],
    "model.max_length": LENGTH,
    "pretrain.length": LENGTH,
    "pretrain.batch_size": 2,
    "pretrain.num_steps": 2,
    "pretrain.evaluate_every": 2,
    "pretrain.optim.warmup_steps": 1,
    "evaluate.pretrain_batches": 1,
    "log.every_steps": 1,
    "log.trackers": (),
  }
  command = [sys.executable, "-m", "instructjax.main", "--config=configs/pretrain.py"]
  command += [f"--config.{name}={value}" for name, value in settings.items()]
  metrics = workdir / "pretrain" / "metrics.jsonl"
  began, first = time.perf_counter(), None
  with open(folder / f"{name}.log", "w") as log:
    child = subprocess.Popen(
      [*command, f"--workdir={workdir}"], stdout=log, stderr=subprocess.STDOUT
    )
    ended = 0
    while not ended:
      if first is None and metrics.exists() and metrics.stat().st_size:
        first = round(time.perf_counter() - began, 1)
      time.sleep(0.02)
      ended, status, usage = os.wait4(child.pid, os.WNOHANG)
  if status or first is None:
    raise RuntimeError(f"{log.name} says why the run did not end as it should")
  return {"first_step_s": first, "peak": usage.ru_maxrss * 1024}


def train_tokenizer(folder: pathlib.Path, vocab_size: int):
  """Trains a tokenizer on the first documents."""
  from instructjax.data import tokenizer as tokenizers

  with open(folder / "text.jsonl") as file:
    texts = [json.loads(line)["text"] for _, line in zip(range(1000), file)]
  tokenizers.train_tokenizer(texts, vocab_size, folder / "tokenizer.model", 0)


def main(arguments: list[str] | None = None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=20_000_000)
  parser.add_argument("--vocab_size", type=int, default=8000)
  parser.add_argument("--whole", action="store_true", help="the main command's first step")
  parser.add_argument("--folder", type=pathlib.Path, help="keep the text and the cache there")
  parser.add_argument("--start", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.start:
    print(json.dumps(start(args.start)))
    return
  with tempfile.TemporaryDirectory() as scratch:
    folder = args.folder or pathlib.Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.jsonl").exists():
      write_text(folder / "text.jsonl", args.tokens)
      train_tokenizer(folder, args.vocab_size)
      (folder / "about.json").write_text(json.dumps({"vocab_size": args.vocab_size}))
    if args.whole:
      runs = {name: whole(folder, name) for name in ("first", "second")}
      print(json.dumps({"benchmark": "token_cache", "whole": True} | runs))
      return
    command = [sys.executable, "-m", "benchmarks.token_cache", f"--start={folder}"]
    first, second = (
      json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
      for _ in range(2)
    )
    second["tokens_per_s"] = None
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    disk = sum(path.stat().st_size for path in files) / first["tokens"]
  result = {"benchmark": "token_cache", "disk_per_token": round(disk, 3)}
  print(json.dumps(result | {"first": first, "second": second}))


if __name__ == "__main__":
  main()
