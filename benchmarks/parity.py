"""Compares instructjax with `transformers`, from saved weights to greedy text; exits 1 if a bound is broken.

  pip install -e '.[compare]'
  python -m benchmarks.parity [--gguf=SmolLM2-135M-Instruct.Q4_1.gguf] [--text FILE ...]

It always compares small models with random weights: transformers saves them, instructjax imports and exports them, and
transformers loads the export. Small models that instructjax writes as GGUF are compared too, if transformers reads
their architecture from there. With --gguf it does the same for a real model, which transformers reads from the file by
itself, and also measures what the import costs, in a process of its own. With --text as well, it encodes 5,000 lines of
these files and compares the ids with those of a tokenizer that is built by hand from the file's vocabulary.

Prints a table, which shows the bound of each column, and one JSON line. The columns:

  right, left   largest difference of float32 logits from those of transformers in float64, for batches padded on that
                side; the bound is ROUNDINGS times `theirs` where that is more
  theirs        the same for transformers' own float32: what rounding alone does to this model; no bound
  nll           difference of the mean NLL of a paragraph's tokens, in nats
  prefill       largest difference of logits after a left-padded prompt
  decode        the same after each of 12 tokens that are fed one at a time through the key/value caches
  greedy        number of tokens that differ in greedy continuations of 4 prompts by 32 tokens each
  export        largest difference between transformers' logits before import and after export
  score in      largest difference of a reward model's scores after import
  score out     the same after export with a bias. Llama-like architectures have no place for the bias, so
                `instructjax_score_bias` from their config.json is added to the score of transformers
  seconds, GB   wall time from opening the file to having weights and tokenizer, and the process's peak memory
  ids, texts    number of lines that are encoded differently, and of lines whose ids are decoded differently

All of this is in float32 on a CPU, which JAX is told to use.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from instructjax.core.errors import UserError

BOUNDS = {
  "right": 5e-4,
  "left": 5e-4,
  "theirs": math.inf,
  "nll": 1e-5,
  "prefill": 5e-4,
  "decode": 5e-4,
  "greedy": 0,
  "export": 0,
  "score in": 1e-4,
  "score out": 1e-4,
  "seconds": 10,
  "GB": 1.5,
  "ids": 0,
  "texts": 0,
}
# Logits may be so many times as far from the exact ones as transformers' float32: where attention is sharp, rounding
# alone comes near a fixed bound.
ROUNDINGS = 3


def bound(column: str, values: dict[str, float]) -> float:
  """The bound of a column, in the row with these values."""
  is_logits = column in ("right", "left")
  return max(BOUNDS[column], ROUNDINGS * values["theirs"] if is_logits else 0.0)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2's file")
  parser.add_argument("--text", type=pathlib.Path, nargs="+", default=[], help="UTF-8 files")
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.text and not args.gguf:
    parser.error("--text needs --gguf, whose tokenizer is compared")
  for path in (args.gguf, *args.text):
    if path and not path.is_file():
      parser.error(f"{path} is not a file")
  needed = ("torch", "transformers", "accelerate")
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  if missing:
    print(
      f"error: {' and '.join(missing)} must be installed; run pip install 'instructjax[compare]'",
      file=sys.stderr,
    )
    return 2
  os.environ["JAX_PLATFORMS"] = "cpu"
  if args.child:
    print(json.dumps(import_cost(args.gguf)))
    return 0
  try:
    return compare(args.gguf, args.text)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def compare(gguf: pathlib.Path | None, texts: list[pathlib.Path]) -> int:
  """Prints each comparison as soon as it is made, then all of them in one line; returns 1 if a bound is broken.

  Raises:
    UserError: a file cannot be read, or is not what a comparison needs.
  """
  load_average = os.getloadavg()[0]
  print(f"load average {load_average:.1f} on {os.cpu_count()} cores")
  results = {}
  for name, values in cases(gguf, texts):
    if not results or values.keys() != list(results.values())[-1].keys():
      print_row("", dict.fromkeys(values, ""), "\n")
      print_row("bound", {column: BOUNDS[column] for column in values})
    print_row(name, values)
    results[name] = values
  broken = [
    f"{name}: {column}"
    for name, values in results.items()
    for column, value in values.items()
    if not value <= bound(column, values)  # NaN breaks it too
  ]
  line = {
    "benchmark": "parity",
    "results": {n: {c: float(f"{v:.3g}") for c, v in r.items()} for n, r in results.items()},
    "bounds": {column: value for column, value in BOUNDS.items() if value < math.inf},
    "load_average": [load_average, os.getloadavg()[0]],
    "broken": broken,
  }
  print(f"\n{json.dumps(line)}")
  return 1 if broken else 0


def cases(gguf: pathlib.Path | None, texts: list) -> Iterator[tuple[str, dict[str, float]]]:
  """(name, column -> value) of every comparison."""
  if gguf:
    # Before torch is imported: a child's peak memory includes what its parent held when it forked.
    command = [sys.executable, "-m", "benchmarks.parity", f"--gguf={gguf}", "--child"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    yield "import", json.loads(output.splitlines()[-1])
  from benchmarks import parity_gguf, parity_models  # late: they import torch

  yield from parity_models.random_models()
  for name, values in parity_gguf.written_models():
    if values is None:
      print(f"{name}: left out, transformers reads no such file")
    else:
      yield name, values
  if gguf:
    yield gguf.name, parity_gguf.compare_model(gguf)
  if texts:
    lines = parity_gguf.sample_lines(texts)
    yield f"{len(lines)} lines", parity_gguf.compare_tokenizers(gguf, lines)


def import_cost(path: pathlib.Path) -> dict[str, float]:
  """Seconds and peak memory of importing weights and tokenizer; Python's own imports count for the memory only."""
  import jax

  from instructjax.core.config import MeshConfig
  from instructjax.parallel import sharding
  from instructjax.train import weights

  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  start = time.perf_counter()
  opened = weights.locate(path)
  jax.block_until_ready(opened.load(mesh, opened.model(mesh)))
  seconds = time.perf_counter() - start
  # getrusage reports memory in bytes on macOS and in KiB on Linux.
  unit = 1 if sys.platform == "darwin" else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {"seconds": seconds, "GB": peak / 1e9}


def print_row(name: str, values: dict[str, float | str], before: str = ""):
  """Prints one line of the table, or the header if the values are empty. A broken bound is marked with '!'."""

  def cell(column, value):
    if value == "":
      return column
    if value == math.inf:
      return "none"
    text = f"{value:.2f}" if column in ("seconds", "GB") else f"{value:.2g}"
    return text if value <= bound(column, values) else f"{text} !"

  cells = "".join(f"{cell(column, value):>11}" for column, value in values.items())
  print(f"{before}{name:30}{cells}", flush=True)


if __name__ == "__main__":
  sys.exit(main())
