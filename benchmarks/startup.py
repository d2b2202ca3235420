"""Measures start-up times: of --help, of importing everything, and of a stage's first step, cold and cached.

  python -m benchmarks.startup --repeats=3

Prints one JSON line: medians of wall seconds and of CPU seconds (user + system). On a busy machine only the wall
seconds grow. The first step is that of `pretrain` in the preset tiny. Cold means a new workdir, in which the tokenizer
is trained too; cached means a workdir with the tokenizer and the compiled programs, as when a run is resumed. Each
measurement is a process of its own, which ends as soon as it has done what is measured.
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

  # The numbers of a step are written as soon as they are known. That is the moment to end at.
  metrics.MetricsWriter.write = lambda *_, **__: os._exit(0)
  # The loop reads a step's numbers one step late, except for steps that it saves: so the first step is saved.
  every_step = "--config.checkpoint.every_steps=1"
  sys.argv = ["main", "--config=configs/pretrain.py", f"--workdir={workdir}", every_step]
  runpy.run_module("instructjax.main", run_name="__main__")


def measure(*arguments: str) -> dict:
  """Runs Python with these arguments; returns the wall and CPU seconds of the process."""
  start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  return {"seconds": seconds, "cpu_seconds": cpu}


def measure_all() -> dict:
  """Measures everything once: name -> wall and CPU seconds."""
  found = {
    f"{command} --help": measure("-m", "instructjax", command, "--help") for command in COMMANDS
  }
  found["import instructjax.stages.pipeline"] = measure("-c", "import instructjax.stages.pipeline")
  with tempfile.TemporaryDirectory() as workdir:
    child = ("-m", "benchmarks.startup", f"--first_step={workdir}")
    found["first step, cold"] = measure(*child)
    shutil.rmtree(f"{workdir}/pretrain")  # the stage only: tokenizer and compiled programs stay
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
