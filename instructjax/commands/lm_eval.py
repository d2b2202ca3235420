"""The command `python -m instructjax lm_eval --model instructjax --model_args checkpoint=PATH --tasks NAME`.

It is the command of EleutherAI's lm-evaluation-harness, with a model more. All flags are the harness's own. More:
docs/evaluation.md.
"""

import sys

from instructjax.commands import cli
from instructjax.core.errors import UserError, one_line


def main(arguments: list[str]):
  """Runs the harness's command.

  Args:
    arguments: the harness's, as on its own command line.
  Raises:
    UserError: the extra `eval` is not installed, or a model argument is wrong.
  """
  try:
    from lm_eval.__main__ import cli_evaluate
  except ImportError as error:
    raise UserError(
      f"lm_eval needs the package lm_eval ({one_line(error)}); run `pip install 'instructjax[eval]'`"
    ) from error
  from instructjax.evaluation import harness  # noqa: F401  (makes the model known)

  sys.argv = ["instructjax lm_eval", *arguments]
  cli_evaluate()


if __name__ == "__main__":
  # After `--` absl leaves flags alone: these are the harness's.
  sys.argv = [sys.argv[0], "--", *sys.argv[1:]]
  cli.run(main, interrupted="interrupted")
