"""The command `python -m instructjax.compare RUN RUN ...`: one report of several finished runs, seeds as error bars.

Nothing is trained or evaluated: it reads what the runs have left.
"""

import pathlib

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError

_OUT = flags.DEFINE_string(
  "out", "comparison", "Folder of the report: index.html and comparison.json; made if missing."
)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a run is not finished or cannot be read, or the report cannot be written.
  """
  if not arguments:
    raise UserError(
      "name the folders of finished runs: python -m instructjax.compare runs/seed0 runs/seed1 --out=DIR"
    )
  out = pathlib.Path(places.require(_OUT.value, "--out"))
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.core import terminal
  from instructjax.report import comparison_groups, comparison_page
  from instructjax.stages import finished_runs

  groups = comparison_groups.groups(finished_runs.read_all(arguments))
  path = comparison_page.write(out, groups)
  comparison_page.show(groups)
  terminal.say(f"comparison: {path}")


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
