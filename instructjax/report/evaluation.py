"""The results of an evaluation laid out as the paper's Table 14: for the terminal, and as a section of an HTML page.

Called by the command `evaluate`. Pure functions of the content of its summary.json, but for `write` and `put_into`.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe

from instructjax.core import terminal
from instructjax.core.errors import writing
from instructjax.core.text import printable
from instructjax.report import table14
from instructjax.report.page import TEMPLATES, VERDICTS

_DASH = "–"
_DECIMALS = {"share": 3, "bits": 3, "percent": 1, "score": 3}
_UNITS = {"share": "", "bits": " [bits]", "percent": " [%]", "score": ""}


def shown(value: float, show: str) -> str:
  """A value of a metric, with the decimals of the paper's table and a real minus sign."""
  if abs(value) >= 1000:
    return f"{value:.4g}".replace("-", "−")
  decimals = _DECIMALS[show]
  return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")  # no minus zero


def between(interval: Sequence[float], show: str) -> str:
  """An interval."""
  return f"[{shown(interval[0], show)}, {shown(interval[1], show)}]"


def _rows(summary: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
  """(part, metric) of each row of the table, in the order of the paper's; what it does not have comes last."""
  order = {name: place for place, name in enumerate(table14.TASKS)}
  parts = sorted(summary["parts"], key=lambda part: order.get(part["task"], len(order)))
  return [(part, metric) for part in parts for metric in part["metrics"] if metric["is_shown"]]


def _name(part: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
  """What a row is, in words that stay together when a narrow terminal shows a table in parts."""
  return f"{part['title']}, {part['prompt_title']}: {_title(metric)}"


def _items(metric: Mapping[str, Any]) -> str:
  """The number of items, or the numbers if models have different ones."""
  return "/".join(map(str, sorted({found["num_items"] for found in metric["models"].values()})))


def _title(metric: Mapping[str, Any]) -> str:
  return metric["title"] + _UNITS[metric["show"]]


def results_table(summary: Mapping[str, Any]) -> terminal.Table:
  """The results, a row for each metric of each prompt; what is missing has a row that says why."""
  models = list(summary["models"])
  rows = []
  for part, metric in _rows(summary):
    cells = [metric["models"].get(name) for name in models]
    rows.append(
      [
        _name(part, metric),
        _items(metric),
        *(
          f"{shown(cell['value'], metric['show'])} {between(cell['interval'], metric['show'])}"
          if cell
          else _DASH
          for cell in cells
        ),
      ]
    )
  for name, reason in missing(summary):
    rows.append([f"{name} (skipped: {reason})", "", *(_DASH for _ in models)])
  return terminal.Table(
    columns=["Task", "Items", *models],
    rows=rows,
    title="Results, with 95% intervals",
  )


def missing(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What is not in the table, as (task, why)."""
  found = [(one["task"], one["reason"]) for one in summary["skipped"]]
  for part in summary["parts"]:
    for key, why in part["missing"].items():
      found.append((f"{part['title']}, {part['prompt_title']}", f"{key}: {why}"))
  return found


def note_lines(summary: Mapping[str, Any]) -> list[str]:
  """A line for whatever else a reader of the results must know."""
  return [
    f"{part['title']}, {part['prompt_title']}: {note}"
    for part in summary["parts"]
    for note in _notes(part)
  ]


def scorer_lines(summary: Mapping[str, Any]) -> list[str]:
  """A line about each scorer whose numbers are in the table: how far it can be trusted."""
  lines = []
  for name, scorer in summary["settings"]["scorers"].items():
    auc = "was not measured" if scorer["auc"] is None else f"is {scorer['auc']:.3f}"
    lines.append(f"{name} is scored by {scorer['name']}, whose AUC on held-out texts {auc}")
  return lines


def peak_memory(summary: Mapping[str, Any]) -> str:
  """What the process that wrote the results has held at most. One that found most answers there holds less."""
  machine, device = summary["memory"]["machine_bytes"], summary["memory"]["device_bytes"]
  of_device = f", {device / 1e9:.2f} GB of a device" if device is not None else ""
  return f"{machine / 1e9:.2f} GB of the machine{of_device}"


def differences_table(summary: Mapping[str, Any]) -> terminal.Table:
  """The differences between models, a row for each pair and metric."""
  rows = [
    [
      _name(part, metric),
      f"{found['b']} − {found['a']}",
      f"{shown(found['difference'], metric['show'])} {between(found['interval'], metric['show'])}",
      found["verdict"],
    ]
    for part, metric in _rows(summary)
    for found in metric["differences"]
  ]
  return terminal.Table(
    columns=["Task", "Models", "Difference", "Verdict"],
    rows=rows,
    title="Differences, paired over items",
    prose=["Models", "Verdict"],
    styles={"higher": "green", "lower": "red", "cannot be told": "dim"},
  )


def findings_table(summary: Mapping[str, Any]) -> terminal.Table:
  """The paper's findings on public sets, and what is to be said of each."""
  return terminal.Table(
    columns=["Finding", "Measured, and when it holds", "Verdict"],
    rows=[
      [one["claim"], f"{one['measured']}. Holds if {one['rule']}.", one["verdict"][1]]
      for one in _findings(summary)
    ],
    title="The paper's findings",
    prose=["Finding", "Measured, and when it holds", "Verdict"],
    styles={"holds": "green", "does not hold": "red", "cannot be told": "dim"},
  )


def _findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The findings in words; verdicts as in a run's report."""
  return [
    {
      "claim": one["claim"],
      "paper": one["paper"],
      "rule": one["rule"].replace(" - ", " − "),
      "measured": ", ".join(
        f"{label} {shown(value, one['show'])} {between(interval, one['show'])}"
        for (label, value), interval in zip(one["measured"].items(), one["interval"])
      ),
      "verdict": VERDICTS[one["holds"]],
    }
    for one in summary["findings"]
  ]


def _cell(found: Mapping[str, Any] | None, show: str) -> dict[str, str]:
  if found is None:
    return {"value": _DASH, "interval": ""}
  return {"value": shown(found["value"], show), "interval": between(found["interval"], show)}


def section(summary: Mapping[str, Any]) -> markupsafe.Markup:
  """The section of a report: Table 14 with the models' columns first and the paper's beside them."""
  models = list(summary["models"])
  rows = [
    {
      "task": part["title"],
      "prompt": part["prompt_title"],
      "metric": _title(metric),
      "items": _items(metric),
      "cells": [_cell(metric["models"].get(name), metric["show"]) for name in models],
      "paper": [
        "/".join(shown(value, metric["show"]) for value in sizes) if sizes else _DASH
        for sizes in (metric["paper"] or [()] * len(table14.MODELS))
      ],
      "notes": [*_notes(part), *table14.notes(part["task"], part["prompt"], metric["key"])],
    }
    for part, metric in _rows(summary)
  ]
  tests = differences_table(summary)
  told = sum(row[-1] != "cannot be told" for row in tests.rows)
  template = TEMPLATES.get_template("evaluation.html.j2")
  return markupsafe.Markup(
    template.render(
      models=[(printable(name), printable(spec)) for name, spec in summary["models"].items()],
      rows=rows,
      paper=table14.MODELS,
      sizes=table14.SIZES,
      findings=_findings(summary),
      tests=tests.rows,
      told=told,
      missing=missing(summary),
      scorers=scorer_lines(summary),
      memory=peak_memory(summary),
      settings=summary["settings"],
    )
  )


def _notes(part: Mapping[str, Any]) -> list[str]:
  """What a reader must know of a row."""
  notes = [part["shots"]] if part["shots"] else []
  words = {"cut": "too long, read without their beginning", "too long": "too long to be asked"}
  for fit, says in words.items():
    found = {name: counts[fit] for name, counts in part["fits"].items() if counts[fit]}
    if found:
      notes.append(f"{says}: {', '.join(f'{name} {count}' for name, count in found.items())}")
  return notes


def write(path: pathlib.Path, summary: Mapping[str, Any]):
  """Writes the section as a page of its own.

  Raises:
    UserError: it cannot be written.
  """
  page = TEMPLATES.get_template("evaluation_page.html.j2").render(section=section(summary))
  with writing(path):
    path.write_text(page, encoding="utf-8")


def put_into(page: pathlib.Path, summary: Mapping[str, Any]) -> bool:
  """Shows the section in a run's report too, in the place of an earlier one.

  Args:
    page: the report's index.html.
    summary: as for `section`.
  Returns:
    Whether the page has a place for it; reports of earlier versions have none.
  Raises:
    UserError: it cannot be read or written.
  """
  parts = {"link": '<a href="#evaluation">Public sets</a>', "section": str(section(summary))}
  with writing(page):
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
      head, begin, rest = text.partition(f"<!-- public sets: {name} -->")
      _, end, tail = rest.partition("<!-- end -->")
      if not end:
        return False
      text = head + begin + content + end + tail
    page.write_text(text, encoding="utf-8")
  return True
