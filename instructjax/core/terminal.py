"""What a person sees in the terminal: lines, tables and progress bars.

Called by every part that prints, except `generate`'s answers. This is the only module that imports rich.

Texts come from models, data, file names and configs. Here they are only ever text: control characters are shown as
escapes (see core/text.py), and nothing is read as rich's markup, so that `[red]` or `[/b]` in a path is neither a
colour nor an error. Nothing is cut off for want of width: lines are left to the terminal to wrap, cells are folded, and
a table that is too wide is shown in parts.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import rich.cells
import rich.console
import rich.progress
import rich.table
import rich.text

from instructjax.core.text import isolated, printable

_GAP = 3  # characters between two columns: padding and the line
_NARROWEST = 12  # characters of a column of prose


@dataclasses.dataclass(frozen=True)
class Table:
  """A table to show.

  Attributes:
    columns: titles. The first column names the row, and is repeated if the table is shown in parts.
    rows: the cells; numbers are formatted already.
    title: shown above it; '' for none.
    prose: titles of columns beside the first that hold text, which is wrapped. The others hold numbers, which are
      aligned to the right and never broken.
    footer: a last row; empty for none.
    styles: text of a cell -> its style, as "yes" -> "green".
  """

  columns: Sequence[str]
  rows: Sequence[Sequence[str]]
  title: str = ""
  prose: Sequence[str] = ()
  footer: Sequence[str] = ()
  styles: Mapping[str, str] = dataclasses.field(default_factory=dict)


Console = rich.console.Console  # for those who are given one


def console(*, stderr: bool = False) -> rich.console.Console:
  """The terminal, or the pipe or file in its place."""
  return rich.console.Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def say(line: str, *, bold: str = "", rest: str = "", to: rich.console.Console | None = None):
  """Prints one line, of any length: `line`, then `bold` in bold, then `rest`."""
  text = rich.text.Text(printable(line))
  text.append(printable(bold), "bold")
  text.append(printable(rest))
  (to or console()).print(text, soft_wrap=True)


def rule(title: str):
  """Prints a line across the terminal that begins with a title."""
  console().rule(rich.text.Text(isolated(title)), align="left")


def loading() -> contextlib.AbstractContextManager:
  """Shows that something is being loaded, while the `with` block runs."""
  return console(stderr=True).status("loading")


def show(table: Table, to: rich.console.Console | None = None):
  """Prints a table, in parts if the terminal is too narrow for all its columns."""
  to = to or console()
  title = table.title
  for part in _parts(table, to.width):
    to.print(_drawn(table, part, title, to.width))
    title = ""


def _parts(table: Table, width: int) -> list[list[int]]:
  """The numbers of the columns in each part."""
  first, rest = 0, range(1, len(table.columns))
  left = width - _least(table, first) - 2 * _GAP + 2
  parts: list[list[int]] = [[first]]
  used = 0
  for i in rest:
    need = _least(table, i) + _GAP
    if used + need > left and len(parts[-1]) > 1:
      parts.append([first])
      used = 0
    parts[-1].append(i)
    used += need
  return parts


def _least(table: Table, i: int) -> int:
  """The characters that a column needs."""
  cells = [printable(row[i]) for row in (*table.rows, table.footer) if row]
  words = [word for word in table.columns[i].split()]
  if i == 0 or table.columns[i] in table.prose:
    longest = max(map(rich.cells.cell_len, cells), default=0)
    return max(*map(len, words), min(longest, _NARROWEST))
  return max(map(rich.cells.cell_len, [*words, *cells]))


def _whole(table: Table, i: int) -> int:
  """The characters that a column takes if nothing in it is wrapped."""
  texts = [table.columns[i], *(row[i] for row in (*table.rows, table.footer) if row)]
  return max(rich.cells.cell_len(printable(text)) for text in texts)


def _drawn(table: Table, part: Sequence[int], title: str, width: int) -> rich.table.Table:
  drawn = rich.table.Table(
    title=rich.text.Text(printable(title)) if title else None,
    title_justify="left",
    show_footer=bool(table.footer),
  )
  # What the other columns leave to the first one. Left to itself, rich narrows all columns alike, finds that some
  # cannot be, and cuts the table off at the terminal's edge.
  most = width - 4 - sum(_least(table, i) + _GAP for i in part if i != 0)
  is_tight = 1 + sum(_whole(table, i) + _GAP for i in part) > width
  for i in part:
    is_text = i == 0 or table.columns[i] in table.prose
    drawn.add_column(
      rich.text.Text(printable(table.columns[i])),
      rich.text.Text(printable(table.footer[i]) if table.footer else ""),
      justify="left" if is_text else "right",
      overflow="fold",
      # Fixed for numbers: rich would otherwise narrow the widest columns first, find that they cannot be, and cut.
      width=_least(table, i) if is_tight and not is_text else None,
      min_width=_least(table, i),
      max_width=max(_least(table, 0), most) if i == 0 else None,
    )
  for row in table.rows:
    # The style of a cell is found by its text.
    drawn.add_row(*(rich.text.Text(isolated(row[i]), table.styles.get(row[i], "")) for i in part))
  return drawn


class Bar:
  """A progress bar with the time left."""

  def __init__(self, to: rich.console.Console, name: str, total: int, done: int, text: str):
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("{task.description:<10}", style="bold", markup=False),
      rich.progress.BarColumn(bar_width=24),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("{task.fields[text]}", markup=False),
      console=to,
      refresh_per_second=4,
    )
    self._task = self._progress.add_task(
      printable(name), total=total, completed=done, text=printable(text)
    )

  def start(self):
    self._progress.start()

  def stop(self):
    self._progress.refresh()
    self._progress.stop()

  def update(self, done: int, text: str):
    self._progress.update(self._task, completed=done, text=printable(text))
