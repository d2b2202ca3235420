"""What passes before anything happens: --help, importing everything, and a stage's first step, cold and cached.

  python -m benchmarks.startup --repeats=3

Prints one JSON line: medians of wall seconds and of CPU seconds (user + system); only the wall seconds grow with
what else the machine does. The first step is that of the tiny preset's `pretrain`: cold in a new workdir, whose
tokenizer is trained too; cached in one that holds the tokenizer and the compiled programs, as when a run is resumed.
Each measurement is a process of its own, which ends once it has what it measures.
"""

import argparse
import json
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = ("run", "generate", "export", "plan")


def first_step(workdir: str):
  """Runs the stage and ends the process as soon as its first step is done."""
  from instructjax.train import metrics

  metrics.MetricsWriter.write = lambda *_, **__: os._exit(0)
  # Steps that are saved have their numbers looked at before the next one is begun.
  every_step = "--config.checkpoint.every_steps=1"
  sys.argv = ["main", "--config=configs/pretrain.py", f"--workdir={workdir}", every_step]
  runpy.run_module("instructjax.main", run_name="__main__")


def measure(*arguments: str) -> dict:
  """Wall and CPU seconds of a Python process."""
  start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  return {"seconds": seconds, "cpu_seconds": cpu}


def measure_all() -> dict:
  """Name -> seconds, each measured once."""
  found = {
    f"{command} --help": measure("-m", "instructjax", command, "--help") for command in COMMANDS
  }
  found["import instructjax.stages.pipeline"] = measure("-c", "import instructjax.stages.pipeline")
  with tempfile.TemporaryDirectory() as workdir:
    child = ("-m", "benchmarks.startup", f"--first_step={workdir}")
    found["first step, cold"] = measure(*child)
    shutil.rmtree(f"{workdir}/pretrain")
    found["first step, cached"] = measure(*child)
  return found


def main(arguments: list[str] | None = None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--first_step", metavar="WORKDIR", help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.first_step:
    first_step(args.first_step)
    return
  runs = [measure_all() for _ in range(args.repeats)]
  medians = {
    name: {key: round(statistics.median(run[name][key] for run in runs), 2) for key in seconds}
    for name, seconds in runs[0].items()
  }
  print(json.dumps({"benchmark": "startup", "repeats": args.repeats, **medians}))


if __name__ == "__main__":
  main()
