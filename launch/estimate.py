"""Turns a program's sizes and costs into a report: whether it fits, how long it may take, and what limits it.

Called by planning.py. Pure arithmetic and text, without JAX. All times are estimates, because nothing has run on a TPU.
"""

import re
from collections.abc import Mapping

from launch import expect
from launch.costs import PHASES, Cost, Summary
from launch.topology import GIB, Chip

_USED = re.compile(r"Used ([\d.]+)G of ([\d.]+)G hbm")
_NEEDED = re.compile(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
_ALLOCATION = re.compile(r"Size: ([\d.]+)([MG])\s+(?:Operator: op_name=\"([^\"]*)\")?")

# The compiler's cost model has no estimate for attention kernels. They are assumed to reach this fraction of the peak
# rate.
KERNEL_RATE = 0.5

# Parts of an op_name that only say which loops and calls an operation is in.
_NESTING = ("jit(step)", "while", "body", "closed_call", "checkpoint")


def memory(
  owners: dict[str, int],
  inside: dict[str, int],
  allocated: int,
  peak: int,
  program: int,
  hbm: float,
) -> dict:
  """The use of a device's HBM, in bytes by owner.

  Args:
    owners: name -> bytes of the arguments, which are in memory all the time.
    inside: name -> bytes of arrays of known size that exist during the rollout only. The update reuses their space.
    allocated: bytes that the program takes, including gaps between arrays.
    peak: the most bytes that are in use at any time.
    program: bytes of the code.
    hbm: bytes that the compiler allows a program to use.
  """
  known = sum(owners.values()) + sum(inside.values()) + program
  return {
    "hbm": int(hbm),
    "allocated": allocated,
    "peak": peak,
    "free": int(hbm) - allocated,
    "arguments": owners,
    "inside": inside,
    "activations and other temporaries": allocated - known,
    "program": program,
  }


def phase_seconds(cost: Cost, chip: Chip) -> dict[str, float]:
  """The seconds that each term of the roofline would take alone."""
  return {
    "compute": cost.flops / chip.flops,
    "HBM": cost.hbm_bytes / chip.hbm_rate,
    "links": cost.wire_bytes / chip.link_rate,
    "DCN": cost.dcn_bytes / chip.dcn_rate,
  }


def timing(summary: Summary, chip: Chip, rows: int, tokens: int, model_rate: float | None) -> dict:
  """Estimates the seconds of an iteration, by phase and in three ways.

  roofline: each phase takes as long as its largest term at the public peak rates. All data is sent over one ring.
  overlapped: the compiler's cost model of computation and of data movement within a chip, with attention kernels added
    at KERNEL_RATE. Communication runs at the same time as far as possible.
  serial: the same, but communication never overlaps with computation.

  Args:
    summary: costs of the program.
    chip: rates of the devices.
    rows, tokens: size of an iteration's batch.
    model_rate: FLOPs of the model in an iteration divided by the peak rate of all devices, in seconds; None to leave
      out the MFU.
  """
  phases = {}
  for name in PHASES:
    cost = summary.phases[name]
    terms = phase_seconds(cost, chip)
    kernels = cost.kernel_flops / (KERNEL_RATE * chip.flops)
    modelled = cost.cycles / chip.clock + kernels
    phases[name] = {
      "flops": cost.flops,
      "hbm_bytes": cost.hbm_bytes,
      "collective_bytes": cost.wire_bytes,
      "dcn_bytes": cost.dcn_bytes,
      "seconds": terms,
      "binds": max(terms, key=terms.get),
      "roofline": max(terms.values()),
      "kernels": kernels,
      "cost_model": modelled,
      "overlapped": max(modelled, terms["links"], terms["DCN"]),
      "serial": modelled + terms["links"] + terms["DCN"],
    }
  totals = {}
  for way in ("roofline", "overlapped", "serial"):
    seconds = sum(phase[way] for phase in phases.values())
    totals[way] = {"seconds": seconds, "rows": rows / seconds, "tokens": tokens / seconds}
    if model_rate is not None:
      totals[way]["mfu"] = model_rate / seconds
  return {"phases": phases, "estimates": totals}


def largest(summary: Summary, number: int) -> list[tuple[str, str, float, float]]:
  """The collectives that send most bytes, as (kind, op_name, number of times that it runs, bytes sent)."""
  items = [(*where, *amounts) for where, amounts in summary.collectives.items()]
  return sorted(items, key=lambda item: -item[3])[:number]


def out_of_memory(message: str) -> dict | None:
  """Reads the compiler's figures, in GiB, from the message that a program does not fit. None for another message."""
  match = _USED.search(message) or _NEEDED.search(message)
  if match is None:
    return None
  largest = [
    {"gib": float(size) / (1024 if unit == "M" else 1), "op_name": name or ""}
    for size, unit, name in _ALLOCATION.findall(message)
  ]
  return {
    "needed": float(match[1]),
    "available": float(match[2]),
    "is_lower_bound": _USED.search(message) is None,
    "largest": largest[:5],
  }


def refusal(report: dict) -> str:
  """The report on a program that does not fit, as text."""
  found, owners = report["out_of_memory"], report["memory"]["arguments"]
  at_least = "at least " if found["is_lower_bound"] else ""
  over = found["needed"] - found["available"]
  what = "temporaries alone need" if found["is_lower_bound"] else "it needs"
  lines = [
    _title(report),
    f"Does not fit: {what} {at_least}{found['needed']:.2f} GiB of HBM a device, and the compiler has"
    f" {found['available']:.2f} GiB: {over:.2f} GiB too much.",
  ]
  name = max(owners, key=owners.get)
  arguments = sum(owners.values())
  lines.append(
    f"Arguments take {_gib(arguments)} of it, the largest of them {name} with {_gib(owners[name])}."
  )
  sizes = owners | report["memory"]["inside"]
  lines += _memory_lines(sizes)
  if found["largest"]:
    lines.append("The compiler's largest allocations:")
    lines += [f"  {item['gib']:8.2f} GiB  {_short(item['op_name'])}" for item in found["largest"]]
  lines += run_refuses(report)
  lines += report.get("changes_text", [])
  return "\n".join(lines)


def outline(report: dict) -> str:
  """The report on a program that was not compiled, as text."""
  held, hbm = report["sketched_bytes"], report["hbm"]
  verdict = "May fit" if report["fits"] else "Does not fit"
  lines = [
    _title(report),
    f"A sketch from sizes: nothing was compiled, nothing has run on a TPU. {_lengths(report)}",
    f"{verdict}: at least about {_gib(held)} of a device's {_gib(hbm)}. The compiler has said up to twice as much.",
    "HBM a device:",
    *_memory_lines(report["memory"]["arguments"]),
    *_memory_lines({f"{k} (rollout only)": v for k, v in report["memory"]["inside"].items()}),
    *expect.text(report["expected"], report["tokens"], report["token_kind"]),
    *expect.run_text(report["run"]),
    *run_refuses(report),
    *report.get("changes_text", []),
  ]
  return "\n".join(lines)


def _title(report: dict) -> str:
  return (
    f"{report['stage']} {report['preset']} on {report['topology']}: {report['devices']} x"
    f" {report['chip']}, --mesh={spell_mesh(report['mesh'])}"
  )


def spell_mesh(sizes: Mapping[str, int]) -> str:
  """A mesh in the form that --mesh accepts, such as `fsdp:64,tensor:4`. Axes of size 1 are left out."""
  parts = [f"{axis}:{size}" for axis, size in sizes.items() if size != 1]
  return ",".join(parts) or ",".join(f"{axis}:1" for axis in list(sizes)[:1])


def _lengths(report: dict) -> str:
  """What the lengths of prompts and answers are taken to be."""
  means = {name: value for name, value in report["means"].items() if value is not None}
  if not means:
    return "Prompts and answers are taken to be as long as they may be."
  said = " and ".join(f"{name}s of {value:g} tokens on average" for name, value in means.items())
  return f"Taken: {said}, lengths geometric and cut at the limit."


def run_refuses(report: dict) -> list[str]:
  """The line that says why a run of all stages would refuse the mesh of this one; none if it would not."""
  refused = report["a_run_refuses"]
  return [f"On this mesh a run of all its stages would be refused. {refused}"] if refused else []


def _gib(size: float) -> str:
  return f"{size / GIB:.2f} GiB"


def _short(op_name: str) -> str:
  """An operation's name without the loops and calls around it."""
  return "/".join(part for part in op_name.split("/") if part not in _NESTING) or "(unnamed)"


def _memory_lines(sizes: dict[str, int]) -> list[str]:
  return [f"  {size / GIB:8.3f} GiB  {name}" for name, size in sizes.items()]


def text(report: dict) -> str:
  """The report on a program that fits, as text."""
  sizes, times = report["memory"], report["timing"]
  lines = [
    _title(report),
    f"Estimates by the compiler, libtpu {report['compiler']['libtpu']}: nothing has run on a TPU. {_lengths(report)}",
    f"Fits: takes {_gib(sizes['allocated'])} of a device's {_gib(sizes['hbm'])},"
    f" {_gib(sizes['free'])} are free; {_gib(sizes['peak'])} are in use at the peak.",
    "HBM a device:",
    *_memory_lines(sizes["arguments"]),
    *_memory_lines({f"{name} (rollout only)": size for name, size in sizes["inside"].items()}),
    *_memory_lines(
      {name: sizes[name] for name in ("activations and other temporaries", "program")}
    ),
    "An iteration, a device, loops multiplied by their trips; seconds are estimates at public peak rates:",
    f"  {'':10}{'TFLOP':>9}{'HBM GB':>9}{'sent GB':>9}{'compute s':>11}{'HBM s':>9}{'links s':>9}"
    f"  {'binds':9}{'cost model s':>12}",
  ]
  for name, phase in times["phases"].items():
    if not phase["flops"] + phase["hbm_bytes"] + phase["collective_bytes"]:
      continue
    seconds = phase["seconds"]
    lines.append(
      f"  {name:10}{phase['flops'] / 1e12:9.2f}{phase['hbm_bytes'] / 1e9:9.1f}"
      f"{phase['collective_bytes'] / 1e9:9.2f}{seconds['compute']:11.3f}{seconds['HBM']:9.3f}"
      f"{seconds['links']:9.3f}  {phase['binds']:9}{phase['cost_model']:12.3f}"
    )
  if kernels := sum(phase["kernels"] for phase in times["phases"].values()):
    lines.append(
      f"  {kernels:.3f} of the cost model's s are attention kernels, of which it knows nothing: by formula, at"
      f" {KERNEL_RATE:.0%} of the peak rate"
    )
  lines += expect.text(report["expected"], report["tokens"], report["token_kind"])
  lines.append("Other ways to estimate it:")
  described = {
    "roofline": "  estimate, roofline",
    "overlapped": "  estimate, compiler's cost model, communication hidden",
    "serial": "  estimate, compiler's cost model, none hidden",
  }
  for way, words in described.items():
    total = times["estimates"][way]
    mfu = f", MFU {total['mfu']:.2f}" if "mfu" in total else ""
    lines.append(
      f"{words}: {total['seconds']:.2f} s an iteration, {total['tokens']:,.0f}"
      f" {report['token_kind']} a second{mfu}"
    )
  if between := sum(phase["dcn_bytes"] for phase in times["phases"].values()):
    seconds = sum(phase["seconds"]["DCN"] for phase in times["phases"].values())
    lines.append(
      f"Between slices, over the data centre's network: {between / 1e9:.3f} GB sent a device, estimate"
      f" {seconds:.3f} s; not in the table's links."
    )
  if report["decode"]:
    decode = report["decode"]
    lines.append(
      f"Decode, layout {decode['layout']}: {decode['steps']:,.0f} steps, each reads and writes"
      f" {decode['step']['hbm_bytes'] / 1e9:.2f} GB and sends {decode['step']['wire_bytes'] / 1e6:.2f} MB a device."
    )
  lines.append("Collectives an iteration, a device:")
  lines += [
    f"  {kind:20}{count:9,.0f} times{size / 1e9:9.2f} GB sent"
    for kind, (count, size) in report["collectives"].items()
  ]
  lines.append("Of them, what sends most:")
  lines += [
    f"  {kind:20}{count:9,.0f} times{size / 1e9:9.2f} GB  {_short(name)}"
    for kind, name, count, size in report["largest_collectives"]
  ]
  transfers = report["host_transfers"]
  lines.append(
    f"Host transfers: {', '.join(transfers)}: there must be none."
    if transfers
    else "Host transfers: none."
  )
  if report["unknown_trips"]:
    lines.append(f"Counted once, of unknown length: {', '.join(report['unknown_trips'])}.")
  lines += expect.run_text(report["run"])
  lines += run_refuses(report)
  lines += report.get("changes_text", [])
  spent = report["compilation"]
  lines.append(
    f"Compiled in {spent['seconds']:.0f} s ({spent['cpu_seconds']:.0f} CPU-seconds,"
    f" {spent['peak_rss_bytes'] / GIB:.1f} GiB)."
  )
  return "\n".join(lines)
