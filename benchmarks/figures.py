"""Measures the tables and the picture of README and docs, and writes them into the pages.

  python -m benchmarks.figures                      what there is, of which code, and what is stale
  python -m benchmarks.figures measure decode       runs the commands behind a table; an idle machine is needed
  python -m benchmarks.figures measure pods --matching=sft     of its commands only those with this text
  python -m benchmarks.figures take findings RUN... reads finished runs of a preset instead
  python -m benchmarks.figures write                writes the pages anew from what was measured

What was measured lies in docs/figures/NAME.json, a record for each command and processor: the lines that the command
printed, and the version, commit, date and processor that they came from. `measure` replaces the record of the same
command and processor and keeps the others, so ratios of two processors can stand side by side. `take` replaces that of
the same seed.

A record also holds a hash of the code that it measured, without its comments and docstrings, and those of runs hold
their settings. A test fails where code or settings have changed since, or where a page shows something else than its
records.
"""

import argparse
import ast
import dataclasses
import datetime
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import instructjax
from benchmarks import preset_settings, tables
from instructjax.core import provenance
from instructjax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"


@dataclasses.dataclass(frozen=True)
class Figure:
  """A table of a page.

  Attributes:
    page: where it stands, between `<!-- NAME -->` and `<!-- end of NAME -->`.
    commands: what `measure` runs after `python -m`; each prints JSON lines. Empty if finished runs are read.
    config: --config of these runs, whose settings must be the same today.
    picture: where the picture of the first run's report goes.
    code: files whose change may change the numbers, as patterns below the root.
    table: records -> Markdown.
    is_dated: whether records may be of older code. They take hours to make, and the table says which commit each is of.
    is_timed: whether the numbers depend on the processor, so that each processor has a record of its own.
  """

  page: str
  commands: tuple[str, ...]
  code: tuple[str, ...]
  table: Callable[[Sequence[dict]], str]
  is_dated: bool = False
  is_timed: bool = True
  config: str = ""
  picture: str = ""


_NETWORKS = tuple(
  f"instructjax/models/{name}.py" for name in ("layers", "positions", "products", "transformer")
)
_PLAN = "launch.plan --json --try_changes=0 --config=configs"
_POD = "--topology=v5e:16x16"
_SFT = f"{_POD} --mesh=fsdp:64,tensor:4 --config.sft.batch_size=256"
# The cheapest first: a machine may have no time for all.
_PLANS = (
  f"{_PLAN}/sft.py:gpt3_1p3b {_SFT}",
  f"{_PLAN}/sft.py:gpt3_6p7b {_SFT}",
  f"{_PLAN}/sft.py:gpt3_1p3b --topology=2xv5e:16x16 --mesh=slice:2,fsdp:64,tensor:4 --config.sft.batch_size=512",
  f"{_PLAN}/ppo_ptx.py:llama3_8b {_POD}",
  f"{_PLAN}/ppo_ptx.py:gpt3_1p3b {_POD}",
  f"{_PLAN}/ppo_ptx.py:gpt3_1p3b {_POD} --config.rollout.slots=128",
  f"{_PLAN}/ppo_ptx.py:llama3_8b {_POD} --config.rollout.slots=128",
  f"{_PLAN}/ppo_ptx.py:llama3_70b {_POD}",
  f"{_PLAN}/ppo_ptx.py:llama3_70b {_POD} --config.rollout.slots=128",
  f"{_PLAN}/ppo_ptx.py:gpt3_6p7b {_POD}",
  f"{_PLAN}/ppo_ptx.py:gpt3_175b --topology=v5p:8x8x16",
  f"{_PLAN}/sft.py:gpt3_175b --topology=v5p:8x8x16 --mesh=fsdp:128,tensor:8 --config.sft.batch_size=1024",
)
_OURS = "--set=ppo.packed_rows=0,ppo.ema_decay=0"
_PACKED = "--set=ppo.packed_rows=1,rollout.slots=16,ppo.ema_decay=0"

FIGURES = {
  "findings": Figure(
    "docs/results.md",
    (),
    (
      *("instructjax/data/demo/*.py", "instructjax/data/bible.py", "instructjax/data/labeling.py"),
      "instructjax/ops/*.py",
      *(f"instructjax/report/{name}.py" for name in ("findings", "doubts", "intervals", "wording")),
    ),
    tables.findings,
    config="configs/ppo_ptx.py",
    picture="docs/report.png",
  ),
  "smollm2": Figure(
    "docs/smollm2.md",
    (),
    (
      *(
        "instructjax/data/conversation/*.py",
        "instructjax/data/labeling.py",
        "instructjax/ops/*.py",
      ),
      *(f"instructjax/report/{name}.py" for name in ("findings", "doubts", "intervals", "wording")),
    ),
    tables.real_model,
    is_dated=True,
    config="configs/ppo_ptx.py:smollm2",
    picture="docs/smollm2.png",
  ),
  "ppo_iteration": Figure(
    "docs/performance.md",
    (
      f"benchmarks.ppo_iteration --workload=W1 --peer=trl --repeats=3 {_OURS}",
      f"benchmarks.ppo_iteration --workload=W2 --peer=trl --repeats=5 {_OURS}",
      f"benchmarks.ppo_iteration --workload=W3 --peer=trl --repeats=3 {_PACKED}",
    ),
    (
      *("benchmarks/ppo_iteration.py", "benchmarks/peers/trl_ppo.py", "instructjax/rl/step.py"),
      *("instructjax/rl/sampling.py", "instructjax/rl/slots.py", *_NETWORKS),
    ),
    tables.iterations,
  ),
  "sft_step": Figure(
    "docs/performance.md",
    tuple(f"benchmarks.sft_step --peer={peer} --repeats=3" for peer in ("trl", "torch", "flax")),
    ("benchmarks/sft_step.py", "benchmarks/peers/*_sft.py", *_NETWORKS),
    tables.training_steps,
  ),
  "decode": Figure(
    "docs/performance.md",
    ("benchmarks.decode --peer=transformers --repeats=3",),
    (
      *("benchmarks/decode.py", "benchmarks/peers/decode_transformers.py"),
      *("instructjax/rl/sampling.py", "instructjax/models/decoding.py", *_NETWORKS),
    ),
    tables.decode_steps,
  ),
  "pods": Figure(
    "docs/pods.md",
    _PLANS,
    (
      *("configs/*.py", "launch/*.py", "instructjax/models/*.py", "instructjax/ops/*.py"),
      *("instructjax/parallel/*.py", "instructjax/rl/*.py", "instructjax/train/optim.py"),
    ),
    tables.pods,
    is_dated=True,
    is_timed=False,
  ),
}
PROMPTS = 10  # whose answers are kept, the first of a run


def _plain(node) -> object:
  """A syntax tree as lists and words. Without what is empty, of which each version of Python has other fields."""
  if isinstance(node, ast.JoinedStr):  # 3.12 ends some format specifications with ''
    parts = [one for one in node.values if not (isinstance(one, ast.Constant) and one.value == "")]
    return ["JoinedStr", *map(_plain, parts)]
  if isinstance(node, ast.AST):
    fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
    return [type(node).__name__, *(field for field in fields if field[1] not in (None, []))]
  if isinstance(node, list):
    return [_plain(one) for one in node]
  return None if node is None else repr(node)


def code_hash(patterns: Sequence[str], root: pathlib.Path = ROOT) -> str:
  """A hash of what the files that match the patterns compute.

  Raises:
    ValueError: a pattern matches no file.
  """
  digest = hashlib.sha256()
  for pattern in patterns:
    paths = sorted(root.glob(pattern))
    if not paths:
      raise ValueError(f"no file matches {pattern!r}")
    for path in paths:
      tree = ast.parse(path.read_text(encoding="utf-8"))
      for node in ast.walk(tree):
        # A docstring changes no number.
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
          node
        ):
          node.body = node.body[1:]
      digest.update(f"{path.relative_to(root)}\n{_plain(tree)}\n".encode())
  return digest.hexdigest()[:16]


def read(name: str, folder: pathlib.Path = FOLDER) -> list[dict]:
  """The records of a figure, in the order in which they are shown; none if it was never measured."""
  path = folder / f"{name}.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def save(name: str, records: Sequence[dict], folder: pathlib.Path = FOLDER):
  """Writes a figure's records."""
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(list(records), indent=1, ensure_ascii=False)
  (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def merge(records: Sequence[dict], new: dict, is_timed: bool = True) -> list[dict]:
  """The records with the new one, in place of the one of the same command and, if `is_timed`, processor."""
  key = lambda record: (record["command"], record["processor"] if is_timed else "")
  kept = [record for record in records if key(record) != key(new)]
  return [*kept, new]


def stale(figure: Figure, records: Sequence[dict]) -> list[str]:
  """The commands of records whose code or settings have changed since they were made."""
  code = code_hash(figure.code)
  settings = preset_settings.now(figure.config) if figure.config else {}
  return [
    record["command"]
    for record in records
    if record["code"] != code or (figure.config and _has_other_settings(record, settings))
  ]


def _has_other_settings(record: dict, today: dict[str, object]) -> bool:
  """Whether a run's settings are not those of today; a record without any is older than they are recorded."""
  if "settings" not in record:
    return True
  return bool(preset_settings.changed(json.loads(record["settings"]), today))


def block(name: str, records: Sequence[dict]) -> str:
  """The part of a page that a figure fills, markers included."""
  body = FIGURES[name].table(records)
  return f"<!-- {name} -->\n\n{body}\n\n{tables.origin(records)}\n\n<!-- end of {name} -->"


def fill(page: str, name: str, text: str) -> str:
  """The page with `text` in place of the figure.

  Raises:
    UserError: the page does not have the figure's two markers, each once.
  """
  start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
    raise UserError(f"the page must have {start} and then {end}, each once")
  before, rest = page.split(start)
  return before + text + rest.split(end)[1]


def _record(name: str, command: str, lines: Sequence[dict], **made: str) -> dict:
  return {"command": command, **made, "code": code_hash(FIGURES[name].code), "lines": list(lines)}


def _processor(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """The processor's name, with what decides the speed of its products."""
  flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
  vectors = [title for flag, title in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags]
  return f"{provenance.cpu_model()}{', ' + vectors[0] if vectors else ''}"


def measure(name: str, matching: str = ""):
  """Runs a figure's commands, one after another, and saves what they print.

  Args:
    name: of the figure.
    matching: only commands with this text in them.
  Raises:
    UserError: nothing is to be run for this figure, or a command fails.
  """
  if not FIGURES[name].commands:
    raise UserError(f"{name} is read from finished runs: take {name} RUN...")
  commands = [command for command in FIGURES[name].commands if matching in command]
  if not commands:
    raise UserError(f"--matching={matching!r} is in no command of {name}")
  for command in commands:
    print(f"python -m {command}", file=sys.stderr, flush=True)
    # The code that the command starts with: it may change while the command runs.
    record = _record(
      name,
      f"python -m {command}",
      (),
      version=instructjax.__version__,
      commit=provenance.commit(ROOT),
      date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
      processor=_processor(),
    )
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode and not _is_refusal(done):
      raise UserError(f"python -m {command} ended with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    save(name, merge(read(name), record | {"lines": lines}, FIGURES[name].is_timed))


def _is_refusal(done: subprocess.CompletedProcess) -> bool:
  """Whether it is the planner that found that a program does not fit, which is a result too."""
  return done.returncode == 1 and done.stdout.startswith("{") and '"fits": false' in done.stdout


def _require_one_command(run: pathlib.Path, made: dict):
  """Checks that all stages of a run are of one commit, and of the preset as it stands but for the seed.

  Raises:
    UserError: they are not.
  """
  for path in sorted(run.glob("*/done.json")):
    of_stage = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    if of_stage is None:  # of the tokenizer
      continue
    if of_stage["commit"] != made["commit"]:
      stage = path.parent.name
      raise UserError(f"{run}/{stage} is of another commit than {run}/evaluate: run it anew, whole")
    flags = [word for word in of_stage["command"].split() if word.startswith("--config.")]
    if others := [flag for flag in flags if not flag.startswith("--config.seed=")]:
      raise UserError(f"{run} has other settings than the preset ({' '.join(others)})")


def _require_same_code(run: pathlib.Path, commit: str, figure: Figure) -> dict[str, object]:
  """Checks that a run is of the code and the settings as they are now; returns its settings.

  Raises:
    UserError: it is not, or it cannot be told.
  """
  same = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *figure.code]
  if not commit or commit.endswith("+changes") or subprocess.run(same).returncode:
    raise UserError(f"{run} is of other code (commit {commit or 'unknown'}): run it anew")
  then = preset_settings.at(commit, figure.config)
  if others := preset_settings.changed(then, preset_settings.now(figure.config)):
    raise UserError(f"{run} has other settings ({', '.join(others)}): run it anew")
  return then


def _of_run(run: pathlib.Path, config: str) -> tuple[dict, dict]:
  """What a finished run measured, as a line of a record, and its provenance.

  Raises:
    UserError: it is not finished, or of another preset.
  """
  try:
    found = json.loads((run / "report" / "findings.json").read_text(encoding="utf-8"))
    costs = json.loads((run / "report" / "costs.json").read_text(encoding="utf-8"))
    done = json.loads((run / "evaluate" / "done.json").read_text(encoding="utf-8"))
    rows = (run / "evaluate" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise UserError(f"{error.filename}: {error.strerror}; is {run} a finished run?") from error
  made = done["provenance"]
  if not any(
    word.startswith("--config=") and word.endswith(config) for word in made["command"].split()
  ):
    raise UserError(f"{run} is no run of --config={config}: {made['command']}")
  first: dict[str, dict] = {}  # prompt -> its first answers
  for row in map(json.loads, filter(None, rows)):
    first.setdefault(row["prompt"], row["answers"])
  line = {
    "seed": done["fingerprint"]["config.seed"],
    "findings": found,
    "policies": done["result"]["summary"],
    "seconds": {stage: cost["seconds"] for stage, cost in costs.items()},
    "answers": [{"prompt": prompt, **first[prompt]} for prompt in list(first)[:PROMPTS]],
  }
  return line, made


def take(name: str, runs: Sequence[pathlib.Path]):
  """Saves what finished runs of this machine and this code measured, and the picture of the first in the table.

  Records of other seeds stay, if code and settings are still theirs: a machine may have no time for all seeds at once.

  Raises:
    UserError: a run is not finished, or of other code or another preset, or the figure does not come from runs.
  """
  figure = FIGURES[name]
  if not figure.config:
    raise UserError(f"{name} is not read from runs: measure {name}")
  records = read(name)
  gone = stale(figure, records)
  records = [record for record in records if record["command"] not in gone]
  folders = {}  # command -> the run
  for run in runs:
    line, made = _of_run(run, figure.config)
    _require_one_command(run, made)
    settings = _require_same_code(run, made["commit"], figure)
    command = (
      f"python -m instructjax.main --config={figure.config} --workdir=runs/seed{line['seed']}"
    )
    made = {
      key: made[key][:10] if key == "date" else made[key] for key in ("version", "commit", "date")
    }
    command += f" --config.seed={line['seed']}"
    record = _record(name, command, [line], **made, processor=_processor())
    # As text, which is one line of the file.
    records = merge(records, record | {"settings": json.dumps(settings)}, is_timed=False)
    folders[command] = run
  records.sort(key=lambda record: record["command"])
  block(name, records)  # what cannot be shown is not saved
  save(name, records)
  if run := folders.get(records[0]["command"]):
    shutil.copy(run / "report" / "report.png", ROOT / figure.picture)


def write():
  """Writes every figure that was measured into its page."""
  for name, figure in FIGURES.items():
    if records := read(name):
      path = ROOT / figure.page
      text = fill(path.read_text(encoding="utf-8"), name, block(name, records))
      path.write_text(text, encoding="utf-8")


def show():
  """Prints what there is."""
  for name, figure in FIGURES.items():
    records = read(name)
    old = stale(figure, records)
    for record in records:
      said = "STALE" if record["command"] in old else "current"
      print(f"{name:14} {said:8} {record['date']} {tables.commit(record)} {record['command']}")
    if not records:
      print(f"{name:14} never measured")


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  kinds = parser.add_subparsers(dest="what")
  measured = kinds.add_parser("measure")
  measured.add_argument("names", nargs="+", choices=FIGURES)
  measured.add_argument("--matching", default="")
  from_runs = kinds.add_parser("take")
  from_runs.add_argument("name", choices=FIGURES)
  from_runs.add_argument("runs", nargs="+", type=pathlib.Path)
  kinds.add_parser("write")
  args = parser.parse_args(arguments)
  try:
    if args.what == "measure":
      for name in args.names:
        measure(name, args.matching)
    elif args.what == "take":
      take(args.name, args.runs)
    if args.what:
      write()
    else:
      show()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
