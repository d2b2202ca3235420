"""Renders what benchmarks measured as Markdown. Pure functions of the records that figures.py keeps.

A record has what `figures` says: command, version, commit, date, processor, and `lines`, which its command printed.
"""

from collections.abc import Sequence
from typing import Any


def _row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return "\n".join([_row(head), "|---" * len(head) + "|", *map(_row, rows)])


def number(value: float) -> str:
  """Three digits behind the point, or three in all, without the zero before the point: .934, -3.29, 41.2."""
  digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
  return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def span(found: dict[str, float]) -> str:
  """A median with the least and the greatest value."""
  low, high = number(found["min"]), number(found["max"])
  return f"{number(found['median'])} ({low} to {high})"


def _gb(value: float) -> str:
  return f"{value:.1f} GB"


def machine(record: dict) -> str:
  """The processor, with the rate of its products if the benchmark measured it."""
  rates = [line["product_gflops"] for line in record["lines"] if "product_gflops" in line]
  return record["processor"] + (f", {rates[0]} GFLOP/s" if rates else "")


def commit(record: dict) -> str:
  """The commit, shortened, and whether the code differed from it."""
  short = record["commit"][:10]
  return short + ("+changes" if record["commit"].endswith("+changes") else "")


def origin(records: Sequence[dict]) -> str:
  """What the numbers come from: code, day, processor and commands, one line for each that differ."""
  made: dict[str, list[str]] = {}
  for record in records:
    code = f"instructjax {record['version']}, commit {commit(record)}"
    key = f"{code}, {record['date']}, {record['processor']}"
    made.setdefault(key, []).append(f"`{record['command']}`")
  return "\n".join(f"- {key}: {', '.join(commands)}" for key, commands in made.items())


def findings(records: Sequence[dict]) -> str:
  """What each finding measured, by seed, with 95% intervals; with several seeds their least and greatest."""
  runs = [line for record in records for line in record["lines"]]
  # What only some of the runs have measured has its row too.
  names: dict[str, dict[str, None]] = {}
  for run in runs:
    for finding in run["findings"]:
      names.setdefault(finding["id"], {}).update(dict.fromkeys(finding["measured"]))
  rows = [
    [f"`{id_}`" if index == 0 else "", name.replace("_", " "), *_over_runs(runs, id_, name)]
    for id_, measured in names.items()
    for index, name in enumerate(measured)
  ]
  rows.append(["findings that hold", "", *(_held(run) for run in runs), *([""] * (len(runs) > 1))])
  seeds = [f"seed {run['seed']}" for run in runs]
  return _table(["finding", "measured", *seeds, *(["of all"] * (len(runs) > 1))], rows)


def _over_runs(runs: Sequence[dict], id_: str, name: str) -> list[str]:
  """What each run has measured under a name of a finding, with its interval; with several runs their span too."""
  cells, values = [], []
  for run in runs:
    same = [one for one in run["findings"] if one["id"] == id_]
    if not same or name not in same[0]["measured"]:
      cells.append("")
      continue
    value, index = same[0]["measured"][name], [*same[0]["measured"]].index(name)
    if value is None:  # not finite
      cells.append("-")
      continue
    values.append(value)
    interval = same[0]["interval"][index : index + 1]
    is_known = interval and None not in interval[0]
    about = f" ({number(interval[0][0])} to {number(interval[0][1])})" if is_known else ""
    cells.append(number(value) + about)
  span_ = f"{number(min(values))} to {number(max(values))}" if values else ""
  return [*cells, *([span_] if len(runs) > 1 else [])]


_POLICIES = {
  "base": "base",
  "sft": "SFT",
  "ppo_init": "PPO init",
  "ppo": "PPO",
  "ppo_ptx": "PPO-ptx",
  "ppo_beta0": "PPO, beta 0",
  "echo": "echo",
  "random_line": "random line",
  "best_line": "best line",
  "demonstrations": "demonstrations",
}
_MEASURED = {
  "gold": "gold score",
  "reward": "reward",
  "names_topic": "names the topic",
  "repeats": "repeats a word pair",
  "distinct": "different answers",
  "ended": "answers that end",
  "kl": "KL from PPO init, nats",
  "pretrain_loss": "loss on held-out text, nats a token",
}
_ANSWERED = ("base", "sft", "ppo", "ppo_ptx")


def real_model(records: Sequence[dict]) -> str:
  """Runs of one preset: means by policy and findings of all, the answers of the first, and what they took."""
  runs = [line for record in records for line in record["lines"]]
  first = runs[0]
  names = [name for name in _POLICIES if any(name in run["policies"] for run in runs)]
  means = [
    [title, *(_over_seeds(runs, name, key) for name in names)] for key, title in _MEASURED.items()
  ]
  answers = [
    [_text(row["prompt"]), *(_text(row[name]) or "(nothing)" for name in _ANSWERED)]
    for row in first["answers"]
  ]
  parts = [
    _means_title(runs),
    _table(["", *(_POLICIES[name] for name in names)], means),
    "The findings:",
    findings(records),
    f"The first {len(answers)} test prompts of seed {first['seed']}, not chosen, each with its first answer:",
    _table(["prompt", *(_POLICIES[name] for name in _ANSWERED)], answers),
    *(_seconds(run) for run in runs),
  ]
  return "\n\n".join(parts)


def _means_title(runs: Sequence[dict]) -> str:
  if len(runs) == 1:
    return f"Means of seed {runs[0]['seed']}:"
  seeds = ", ".join(run["seed"] for run in runs)
  return f"Means over seeds {seeds}, with the least and the greatest of a seed:"


def _over_seeds(runs: Sequence[dict], name: str, key: str) -> str:
  """A policy's mean over runs, with the span of the runs' own means; '' where none has it."""
  found = [run["policies"].get(name, {}).get(key) for run in runs]
  values = [value for value in found if value is not None]
  if not values:
    return ""
  mean = number(sum(values) / len(values))
  if len(runs) == 1:
    return mean
  some = "" if len(values) == len(runs) else f", {len(values)} of {len(runs)} seeds"
  return f"{mean} ({number(min(values))} to {number(max(values))}{some})"


def _text(text: str) -> str:
  """A text on one line of a table."""
  return " ".join(text.replace("|", "\\|").split())


def _seconds(run: dict) -> str:
  found = run["seconds"]
  parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in found.items())
  return f"Seconds of seed {run['seed']}, {sum(found.values()):.0f} in all: {parts}."


def _held(run: dict) -> str:
  found: list[Any] = [finding["holds"] for finding in run["findings"]]
  return f"{sum(value is True for value in found)} of {len(found)}"


def _pair(lines: Sequence[dict], key: str) -> tuple[dict, dict, str, dict]:
  """(our line, the peer's line, the peer's name, our medians over the peer's) of a call with one peer."""
  (ratios,) = (line for line in lines if any(name.startswith("over_") for name in line))
  (peer,) = (name.removeprefix("over_") for name in ratios if name.startswith("over_"))
  programs = [line for line in lines if key in line]
  (theirs,) = (line for line in programs if line[key] == peer)
  ours = next(line for line in programs if line[key] != peer)
  return ours, theirs, peer, ratios[f"over_{peer}"]


def iterations(records: Sequence[dict]) -> str:
  """PPO iterations beside a peer."""
  rows = []
  for record in records:
    ours, theirs, peer, ratios = _pair(record["lines"], "variant")
    mine, others = (f"{span(one['wall_s'])} s, {_gb(one['peak_rss_gb'])}" for one in (ours, theirs))
    ratio = f"**{number(ratios[ours['variant']]['wall_s'])}**"
    bound = f"{number(ours['bound_s'])} s"
    rows.append([ours["workload"], machine(record), bound, mine, f"{peer}: {others}", ratio])
  return _table(["workload", "processor", "bound", "instructjax", "peer", "ours over theirs"], rows)


def training_steps(records: Sequence[dict]) -> str:
  """Training steps beside peers."""
  rows = []
  for record in records:
    ours, theirs, peer, ratios = _pair(record["lines"], "variant")
    mine, others = (
      f"{one['tokens_per_s']:.0f} tokens/s, {span(one['wall_s'])} s, {_gb(one['peak_rss_gb'])}"
      for one in (ours, theirs)
    )
    ratio = f"**{number(ratios[ours['variant']]['wall_s'])}**"
    rows.append([peer, machine(record), f"{number(ours['bound_s'])} s", mine, others, ratio])
  return _table(["peer", "processor", "bound", "instructjax", "theirs", "ours over theirs"], rows)


def decode_steps(records: Sequence[dict]) -> str:
  """Decode steps beside a peer, by number of rows."""
  rows = []
  for record in records:
    ours, theirs, peer, ratios = _pair(record["lines"], "program")
    for batch in (1, 16):
      key = f"batch_{batch}_step_ms"
      mine, others = (f"{number(one[key])} ms" for one in (ours, theirs))
      floor, ratio = f"{number(ours['floor_ms'])} ms", f"**{number(ratios[key])}**"
      rows.append([str(batch), machine(record), floor, mine, f"{peer}: {others}", ratio])
  head = ["rows", "processor", "reading the weights", "instructjax", "peer", "ours over theirs"]
  return _table(head, rows)


def pods(records: Sequence[dict]) -> str:
  """What the planner says of each program: memory, expected and other times, what is sent, and the code's commit."""
  head = [
    *("program", "GiB a device: allocated, in use", "expected s an iteration", "tokens a second"),
    *("roofline, cost model with communication hidden, none hidden", "sent a device"),
    *("a decode step reads, sends", "compiled in CPU-s", "commit, libtpu"),
  ]
  return _table(head, [_plan(record) for record in records])


def _plan(record: dict) -> list[str]:
  """The row of a program."""
  (found,) = record["lines"]
  mesh = ",".join(f"{axis}:{size}" for axis, size in found["mesh"].items() if size != 1)
  settings = [word for word in record["command"].split() if word.startswith("--config.")]
  named = "".join(f", {word.removeprefix('--config.')}" for word in settings)
  name = f"{found['stage']} {found['preset']}, {found['topology']}, `{mesh}`{named}"
  made = f"{commit(record)}, {found['compiler']['libtpu']}"
  if not found["fits"]:
    needed = found["out_of_memory"]["needed"]
    return [name, f"does not fit: {needed:.1f} GiB", *[""] * 6, made]
  gib = 2**30
  memory, expected, estimates = found["memory"], found["expected"], found["timing"]["estimates"]
  sent = sum(size for _, size in found["collectives"].values()) / 1e9
  step = found["decode"] and found["decode"]["step"]
  return [
    name,
    f"{memory['allocated'] / gib:.2f}, {memory['peak'] / gib:.2f}",
    f"**{expected['seconds']:.3g}** ({expected['least']:.3g} to {expected['most']:.3g})",
    f"{found['tokens'] / expected['seconds']:,.0f}",
    ", ".join(f"{estimates[way]['seconds']:.2f}" for way in ("roofline", "overlapped", "serial")),
    f"{sent:,.0f} GB",
    f"{step['hbm_bytes'] / 1e9:.2f} GB, {step['wire_bytes'] / 1e6:.2f} MB" if step else "",
    f"{found['compilation']['cpu_seconds']:.0f}",
    made,
  ]
