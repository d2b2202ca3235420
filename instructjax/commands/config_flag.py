"""The --config flag: which file is meant, what it may raise, and which fields the command line changes.

Used by the commands that take a config. ml_collections parses the flags; what it does not tell in a way that helps
(a file that fails, a field that is not there) is told here. Never imports JAX.
"""

import importlib.machinery
import importlib.util
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict, config_flags

from instructjax.core.blocks import nearest
from instructjax.core.errors import UserError

# Beside the package, in a checkout as in what pip installs.
INSTALLED = pathlib.Path(__file__).parents[2] / "configs"
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<path>[^=]*)(=.*)?", re.DOTALL)


def define() -> flags.FlagHolder:
  """Defines --config and what follows from it, --config.FIELD.

  Reading the holder's value gives the ConfigDict with what the command line changes. What is wrong with it raises
  UserError while flags are parsed.
  """
  argv: list[
    str
  ] = []  # filled when flags are parsed: ml_collections would read a --flagfile on import
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, as configs/ppo_ptx.py; FILE:PRESET picks a size. ppo_ptx, or a path that is not here, is looked up"
    " among those that come with instructjax.",
    lock_config=True,
    sys_argv=argv,
  )
  flags.FLAGS["config"].parser = _Parser(argv)
  # An optional number is None or a number, whichever it was before.
  config_flags.register_flag_parser_for_type(float, _OptionalFloat())
  config_flags.register_flag_parser_for_type(types.NoneType, _OptionalFloat())
  return holder


def locate(name: str) -> pathlib.Path:
  """The file that --config=NAME means: the user's own where there is one, else one that comes with instructjax.

  Args:
    name: a path, with or without `.py`, or the bare name of one of `configs/`.
  Raises:
    UserError: there is neither.
  """
  if not name:
    raise UserError("--config= names no file, as configs/ppo_ptx.py")
  path = pathlib.Path(name)
  spelled = [path] if path.suffix == ".py" else [path, pathlib.Path(f"{name}.py")]
  own = [*spelled, *(INSTALLED.name / one for one in spelled)]
  is_bare = len(path.parts) == 1 or path.parts[:-1] == (INSTALLED.name,)
  installed = [INSTALLED / one.name for one in spelled if is_bare]
  for candidate in (*own, *installed):
    if candidate.is_file():
      return candidate
  if path.is_dir():
    raise UserError(f"--config={name} is a folder; name a file in it, as {path / 'ppo_ptx.py'}")
  raise UserError(
    f"--config={name}: there is no such file here, nor is it one of those that come with instructjax:"
    f" {', '.join(installed_names())}"
  )


def installed_names() -> list[str]:
  """Names of the config files that come with instructjax."""
  files = sorted(INSTALLED.glob("*.py"))
  return [path.stem for path in files if "def get_config(" in path.read_text(encoding="utf-8")]


def load(spelling: str) -> ConfigDict:
  """The config of FILE or FILE:PRESET.

  Raises:
    UserError: there is no such file, it does not run, or it gives no config.
  """
  name, colon, preset = spelling.partition(":")
  path = locate(name)
  flag = f"--config={spelling}"
  try:
    module = run_file(path)
    if not callable(getattr(module, "get_config", None)):
      raise UserError(
        f"{flag}: {path} is no config: it has no get_config(); as an example, see configs/ppo_ptx.py"
      )
    config = module.get_config(*([preset] if colon else []))
  except UserError:
    raise
  except Exception as error:  # whatever the file's author may have got wrong
    raise UserError(f"{flag}: {_failure(path, error)}") from error
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{flag}: get_config() must return an ml_collections.ConfigDict, got {type(config).__name__}"
    )
  return config


def run_file(path: pathlib.Path) -> types.ModuleType:
  """The module that a Python file makes, wherever it lies."""
  loader = importlib.machinery.SourceFileLoader("config_file", str(path))
  spec = importlib.util.spec_from_loader(loader.name, loader)
  if spec is None:
    raise ValueError(f"Python makes no module of {path}")
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # a dataclass in it looks there for its module
  loader.exec_module(module)
  return module


def _failure(path: pathlib.Path, error: Exception) -> str:
  """One line: what a config file raised, and where in the file, unless it is a rule that it tells itself."""
  text = " ".join(str(error).split())
  if isinstance(error, ValueError) and not isinstance(error, UnicodeError | SyntaxError):
    return text  # as an unknown preset
  if isinstance(error, SyntaxError):
    return f"{error.filename}, line {error.lineno}: {error.msg}"
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(path)
  ]
  where = f"{path}, line {lines[-1]}" if lines else str(path)
  hint = (
    "; it must be installed, or lie in the working directory"
    if isinstance(error, ImportError)
    else ""
  )
  return f"{where}: {type(error).__name__}: {text}{hint}"


class _Parser(flags.ArgumentParser):
  """Loads the file, then refuses what the command line would change and cannot."""

  def __init__(self, argv: list[str]):
    """Takes the list in which ml_collections looks for --config.FIELD."""
    self._argv = argv

  def parse(self, argument: str) -> ConfigDict:
    self._argv[:] = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    config = load(argument)
    config.lock()
    for override in filter(None, map(_OVERRIDE.fullmatch, self._argv[1:])):
      _require_field(override["path"], config, argument)
    return config


class _OptionalFloat(flags.FloatParser):
  """A number, or None; fields that must be a number are checked where the config is."""

  # pyrefly: ignore[bad-override]  absl takes any value from a parser, None too
  def parse(self, argument: float | str | None) -> float | None:
    if argument is None or argument == "None":
      return None
    return super().parse(argument)


def _require_field(name: str, config: ConfigDict, spelling: str):
  """Raises UserError where the config has no such field, or it is not for the command line to change."""
  if name == "preset":
    file = spelling.partition(":")[0]
    raise UserError(
      f"--config.preset only labels a run and changes no setting; a preset is chosen with --config={file}:PRESET"
    )
  known = list(_leaves(config))
  if name in known or any(one.startswith(f"{name}.") for one in known):
    return
  near = nearest(name, known)
  hint = f"did you mean {' or '.join(f'--config.{one}' for one in near)}?" if near else ""
  raise UserError(f"--config has no field {name}; {hint or '--settings lists them'}")


def _leaves(block: ConfigDict, where: str = "") -> Iterator[str]:
  for name, value in block.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{where}{name}.")
    else:
      yield where + name
