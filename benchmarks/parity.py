"""How far instructjax is from `transformers`, from saved weights to greedy text; exits 1 if a bound is broken.

  pip install -e '.[compare]'
  python -m benchmarks.parity [--gguf=SmolLM2-135M-Instruct.Q4_1.gguf] [--text FILE ...]

Always: models of random weights that transformers saves, imported, compared, exported, loaded again.
With --gguf: the same for a real model, whose weights transformers reads from the file by itself, and
what its import costs in a process of its own. With --text as well: ids of 5,000 lines of these files
against a tokenizer built from the file's vocabulary by hand.

Prints a table, which shows the bound of each column, and one JSON line. The columns:

  right, left   largest difference of float32 logits, batches padded on that side
  nll           difference of the mean NLL of a paragraph's tokens, in nats
  prefill       largest difference of logits after a left-padded prompt
  decode        the same after each of 12 tokens fed one at a time through the key/value caches
  greedy        tokens that differ in the greedy continuations of 4 prompts by 32 tokens
  export        largest difference of transformers' logits before import and after export
  score in      largest difference of a reward model's scores, imported
  score out     the same, exported with a bias. Llama-like architectures have no place for the bias:
                `instructjax_score_bias` of their config.json is added to what transformers says
  seconds, GB   wall time from opening the file to weights and tokenizer, the process's peak memory
  ids, texts    lines that are encoded, and whose ids are decoded, differently

Float32 on a CPU, so JAX is told to use that.
"""

import argparse
import importlib.util
import json
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
  needed = ("torch", "transformers", *(["accelerate"] if args.gguf else []))
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
  """Prints every comparison as soon as it is made, then all in one line; 1 if a bound is broken."""
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
    if not value <= BOUNDS[column]  # NaN breaks it too
  ]
  line = {
    "benchmark": "parity",
    "results": {n: {c: float(f"{v:.3g}") for c, v in r.items()} for n, r in results.items()},
    "bounds": BOUNDS,
    "load_average": [load_average, os.getloadavg()[0]],
    "broken": broken,
  }
  print(f"\n{json.dumps(line)}")
  return 1 if broken else 0


def cases(gguf: pathlib.Path | None, texts: list) -> Iterator[tuple[str, dict[str, float]]]:
  """(name, column -> value) of every comparison."""
  if gguf:
    # First: a child's peak memory counts its parent's at the time, which has no torch yet.
    command = [sys.executable, "-m", "benchmarks.parity", f"--gguf={gguf}", "--child"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    yield "import", json.loads(output.splitlines()[-1])
  from benchmarks import parity_gguf, parity_models  # late: they import torch

  yield from parity_models.random_models()
  if gguf:
    yield gguf.name, parity_gguf.compare_model(gguf)
  if texts:
    lines = parity_gguf.sample_lines(texts)
    yield f"{len(lines)} lines", parity_gguf.compare_tokenizers(gguf, lines)


def import_cost(path: pathlib.Path) -> dict[str, float]:
  """Of weights and tokenizer; Python's own imports count for memory only."""
  import jax

  from instructjax.core.config import MeshConfig
  from instructjax.parallel import sharding
  from instructjax.train import weights

  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  start = time.perf_counter()
  opened = weights.locate(path)
  jax.block_until_ready(opened.load(mesh, opened.model(mesh)))
  seconds = time.perf_counter() - start
  unit = 1 if sys.platform == "darwin" else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {"seconds": seconds, "GB": peak / 1e9}


def print_row(name: str, values: dict[str, float | str], before: str = ""):
  """One line of the table; the header, where the values are empty. A broken bound is marked."""

  def cell(column, value):
    if value == "":
      return column
    text = f"{value:.2f}" if column in ("seconds", "GB") else f"{value:.2g}"
    return text if value <= BOUNDS[column] else f"{text} !"

  cells = "".join(f"{cell(column, value):>11}" for column, value in values.items())
  print(f"{before}{name:30}{cells}", flush=True)


if __name__ == "__main__":
  sys.exit(main())
