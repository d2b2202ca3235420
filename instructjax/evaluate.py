"""The command `python -m instructjax.evaluate --models=sft=RUN/sft,ppo=RUN/ppo --data=DIR --out=DIR`.

It asks finished models the tasks of the paper's Table 14, and shows what can be told of their differences. Nothing is
trained. More: docs/evaluation.md.
"""

import pathlib

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.core.foreign import named
from instructjax.evaluation import model_flag

_MODELS = flags.DEFINE_list(
  "models",
  [],
  "Who is asked, as NAME=PATH,...: finished stages (ppo=runs/demo/ppo), Hugging Face folders, .gguf files or"
  " hf://ORG/NAME.",
)
_TASKS = flags.DEFINE_list(
  "tasks",
  ["all"],
  "Tasks, or TASK/PROMPT for one prompt of a task; 'all' is every task that --data has rows of.",
)
_DATA = flags.DEFINE_list(
  "data",
  [],
  "Where rows are: folders that are searched for the tasks' files, TASK=FILE, TASK=tfds:NAME:SPLIT, the same with"
  " TASK.train= for worked examples, and tfds: for what TensorFlow Datasets holds.",
)
_SCORERS = flags.DEFINE_list(
  "scorers",
  [],
  "Who judges answers in words: toxicity=SPEC for RealToxicity, truth=SPEC and info=SPEC for TruthfulQA.",
)
_CHAT = flags.DEFINE_list(
  "chat", [], "Models of --models that are asked through their chat templates, or 'all'."
)
_OUT = flags.DEFINE_string("out", "", "Folder of the results; the same command goes on there.")
_LIMIT = flags.DEFINE_integer(
  "limit", 0, "At most so many items of a task, drawn by --seed; 0 for all."
)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the items of --limit and the worked examples.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "auto", ["auto", "float32", "bfloat16"], "Numbers that models compute with."
)
_REDO = flags.DEFINE_bool(
  "redo", False, "Replace results in --out that other models, data or prompts have given."
)


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag is wrong, a model or a file cannot be read, or --out holds other results.
  """
  if arguments:
    raise UserError(f"unexpected arguments {arguments}; see --help")
  models = model_flag.parse(_MODELS.value, "sft=runs/demo/sft,ppo=runs/demo/ppo")
  chats = parse_chat(_CHAT.value, tuple(models))
  if not _DATA.value:
    raise UserError("--data must name a folder with the tasks' files, TASK=FILE or tfds:")
  out = pathlib.Path(places.require(_OUT.value, "--out"))
  if _LIMIT.value < 0:
    raise UserError(f"--limit={_LIMIT.value} must be 0 for all items, or a number of items")
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.evaluation import command, rows, runner, tasks

  found = tasks.found()
  data = rows.parse_data([places.expand(value, "--data") for value in _DATA.value], list(found))
  settings = runner.Settings(
    tasks=parse_tasks(_TASKS.value, {name: tuple(task.prompts) for name, task in found.items()}),
    limit=_LIMIT.value or None,
    seed=_SEED.value,
    redo=_REDO.value,
    dtype=command.dtype(_DTYPE.value),
  )
  scorers = parse_scorers(_SCORERS.value, tasks.JUDGES)
  command.run(models, data, settings, out, scorers, chats)


def parse_chat(values: list[str], names: tuple[str, ...]) -> frozenset[str]:
  """The models that --chat names.

  Args:
    values: of --chat.
    names: of all models.
  Raises:
    UserError: one is no model's name.
  """
  for value in values:
    if value not in (*names, "all"):
      raise UserError(
        f"--chat={named(value)} must be all, or some of {', '.join(map(named, names))}"
      )
  return frozenset(names if "all" in values else values)


def parse_scorers(values: list[str], names: tuple[str, ...]) -> dict[str, str]:
  """Name -> spec of the scorers that --scorers names.

  Args:
    values: of --scorers.
    names: that there are.
  Raises:
    UserError: a name is not known or there twice, or has no spec.
  """
  result: dict[str, str] = {}
  for value in values:
    name, _, spec = value.partition("=")
    if name not in names or not spec or name in result:
      raise UserError(
        f"--scorers={named(value)} must be NAME=SPEC, each name once, of {', '.join(names)}"
      )
    result[name] = spec
  return result


def parse_tasks(
  values: list[str], prompts: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
  """Task -> its prompts that are asked.

  Args:
    values: of --tasks.
    prompts: task -> all of its prompts.
  Raises:
    UserError: a task or prompt is not known.
  """
  result: dict[str, list[str]] = {}
  for value in values:
    name, _, prompt = value.strip().partition("/")
    if name not in (*prompts, "all"):
      raise UserError(f"--tasks={named(value)} must be one of all, {', '.join(prompts)}")
    if prompt and prompt not in prompts.get(name, ()):
      known = ", ".join(f"{name}/{known}" for known in prompts.get(name, ())) or "all"
      raise UserError(f"--tasks={named(value)} must be {known}")
    for task in prompts if name == "all" else (name,):
      asked = (prompt,) if prompt else prompts[task]
      result.setdefault(task, []).extend(p for p in asked if p not in result.get(task, []))
  if not result:
    raise UserError("--tasks must name a task, or all")
  return {task: tuple(chosen) for task, chosen in result.items()}


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted; the same command goes on where this one was stopped")
