"""Runs `instructjax COMMAND ...` and `python -m instructjax COMMAND ...`.

Only the module of the chosen command is imported, so that the help and short commands start quickly.
"""

import difflib
import os
import runpy
import sys
from collections.abc import Sequence

import instructjax

# Command -> (module, description). Each module can also be run alone: it defines its own flags and calls cli.run.
COMMANDS = {
  "run": ("instructjax.main", "train a stage and all that it starts from, evaluate, and report"),
  "generate": ("instructjax.commands.generate", "answer prompts with one or several checkpoints"),
  "evaluate": ("instructjax.evaluate", "ask finished models the tasks of the paper's Table 14"),
  "rewards": ("instructjax.commands.rewards", "measure reward models on ranked answers"),
  "preference": (
    "instructjax.commands.preference",
    "say whose answers are preferred, and to whose",
  ),
  "compare": (
    "instructjax.compare",
    "make one report of several finished runs, seeds as error bars",
  ),
  "label": ("instructjax.label", "let people write, rate and rank answers in a browser"),
  "export": ("instructjax.commands.export", "write weights as a Hugging Face folder or GGUF file"),
  "lm_eval": ("instructjax.commands.lm_eval", "run tasks of lm-evaluation-harness on a model"),
  "train_scorer": (
    "instructjax.commands.train_scorer",
    "train a scorer of texts, as toxicity, from labelled ones",
  ),
  "plan": ("launch.plan", "ask the TPU's compiler whether a stage fits a slice, without a TPU"),
}
_EXAMPLE = "instructjax run --config=ppo_ptx --workdir=runs/demo"


def main(argv: Sequence[str] | None = None):
  """Runs the command that the command line names, which ends the process with an exit code.

  Args:
    argv: the command line without the program's name; None takes it from sys.argv.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  name = arguments[0] if arguments else "--help"
  if name in ("--help", "-h", "--helpfull", "help"):
    print(_help())
    sys.exit(0 if arguments else 2)
  if name == "--version":
    print(f"instructjax {instructjax.__version__}")
    sys.exit(0)
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    print(f"error: {name} is not a command of instructjax; {hint}", file=sys.stderr)
    sys.exit(2)
  module, _ = COMMANDS[name]
  # absl shows the first word as the program's name.
  sys.argv = [f"instructjax {name}", *arguments[1:]]
  # The installed script does not have the working directory on the path, as `python -m` does. A user's config file may
  # import modules from there.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  # Run as `__main__`, because absl's --help shows the flags of the main module.
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def _help() -> str:
  width = max(map(len, COMMANDS))
  rows = [f"  {name:{width}}  {says}" for name, (_, says) in COMMANDS.items()]
  return "\n".join(
    [
      f"instructjax {instructjax.__version__}: the InstructGPT recipe, from text to report",
      "",
      "usage: instructjax COMMAND --FLAG=VALUE ...",
      "",
      *rows,
      "",
      "instructjax COMMAND --help shows the flags of a command. To begin with:",
      "",
      f"  {_EXAMPLE}",
    ]
  )


if __name__ == "__main__":
  main()
