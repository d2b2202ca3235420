"""The --config flag: finds and runs the config file, and applies changes from the command line.

Used by the commands that take a config. ml_collections parses the flags. This module adds helpful messages for config
files that fail and for fields that do not exist. It never imports JAX.
"""

import functools
import importlib.machinery
import importlib.util
import pathlib
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict, config_flags

from instructjax.commands import weights_preset
from instructjax.core import places
from instructjax.core.blocks import nearest
from instructjax.core.errors import UserError, one_line, raiser

_LONGEST = 300  # letters of an error message that is quoted
# configs/ is beside the package, both in a checkout and in an installation by pip.
INSTALLED = pathlib.Path(__file__).parents[2] / "configs"
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<path>[^=]*)(=.*)?", re.DOTALL)


@functools.cache  # commands that are imported together, by tests, share the flag
def define() -> flags.FlagHolder:
  """Defines the flags --config and --config.FIELD.

  The holder's value is the ConfigDict with the changes from the command line. Mistakes raise UserError when the flags
  are parsed.
  """
  # Filled later, by the parser. If ml_collections took sys.argv, it would read a --flagfile when this is imported.
  argv: list[str] = []
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, as configs/ppo_ptx.py; FILE:PRESET picks a size. ppo_ptx, or a path that is not here, is looked up"
    " among those that come with instructjax.",
    lock_config=True,
    sys_argv=argv,
  )
  flags.FLAGS["config"].parser = _Parser(argv)
  # ml_collections picks a parser by the type of a field's present value. A field that may be None or a number needs a
  # parser for either.
  config_flags.register_flag_parser_for_type(float, _OptionalFloat())
  config_flags.register_flag_parser_for_type(types.NoneType, _OptionalFloat())
  return holder


def locate(name: str) -> pathlib.Path:
  """Finds the file that --config=NAME means. The user's own file takes precedence over one that comes with instructjax.

  Args:
    name: a path, with or without `.py`, or the bare name of a file in `configs/`.
  Raises:
    UserError: there is no such file.
  """
  if not name:
    raise UserError("--config= names no file, as configs/ppo_ptx.py")
  path = pathlib.Path(places.expand(name, "--config"))
  name = str(path)
  spelled = [path] if path.suffix == ".py" else [path, pathlib.Path(f"{name}.py")]
  # ppo_ptx also means configs/ppo_ptx.py below the working directory, such as an edited copy in a checkout.
  own = [*spelled, *(INSTALLED.name / one for one in spelled)]
  # A path such as runs/old/ppo_ptx.py names the user's file only. Falling back would run another config than asked for.
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
  """The names of the config files that come with instructjax."""
  files = sorted(INSTALLED.glob("*.py"))
  # configs/ also holds modules that the config files import, such as base.py.
  return [path.stem for path in files if "def get_config(" in path.read_text(encoding="utf-8")]


def load(spelling: str) -> ConfigDict:
  """Runs a config file and returns its config.

  Args:
    spelling: FILE or FILE:PRESET.
  Raises:
    UserError: there is no such file, it fails, or it returns no config.
  """
  name, colon, preset = spelling.partition(":")
  path = locate(name)
  flag = f"--config={spelling}"
  try:
    module = run_file(path)
    get_config = getattr(module, "get_config", None)
    config = get_config(*([preset] if colon else [])) if callable(get_config) else None
  except (Exception, SystemExit) as error:  # a user's file may raise anything
    raise UserError(f"{flag}: {_failure(path, error)}") from error
  if not callable(get_config):
    raise UserError(
      f"{flag}: {path} is no config: it has no get_config(); as an example, see configs/ppo_ptx.py"
    )
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{flag}: get_config() must return an ml_collections.ConfigDict, got {type(config).__name__}"
    )
  return config


def run_file(path: pathlib.Path) -> types.ModuleType:
  """Runs a Python file at any path and returns its module."""
  # The loader is named explicitly, because the file's name need not end in .py.
  loader = importlib.machinery.SourceFileLoader("config_file", str(path))
  spec = importlib.util.spec_from_loader(loader.name, loader)
  if spec is None:
    raise ValueError(f"Python makes no module of {path}")
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # a dataclass in the file looks up its module there
  with warnings.catch_warnings():
    # A file that is no Python may have a doubtful escape in each line, and a warning for each would hide the error.
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    loader.exec_module(module)
  return module


def _failure(path: pathlib.Path, error: BaseException) -> str:
  """Describes in one line what a config file raised and where.

  Two errors are messages for the user, so their text is returned alone: a UserError, and the ValueError of
  configs/models.py for an unknown preset (configs/ imports nothing of this package).
  """
  text = "".join(c if c.isprintable() else "?" for c in one_line(error))
  text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
  is_preset = isinstance(error, ValueError) and raiser(error) == "configs.models"
  if isinstance(error, UserError) or is_preset:
    return text
  if isinstance(error, SyntaxError):
    # None for a file that is no text at all.
    where = f"{error.filename}, line {error.lineno}" if error.lineno else str(path)
    return f"{where}: {' '.join(error.msg.split())[:_LONGEST]}: it is not a Python file"
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(path)
  ]
  # The innermost line of the config file itself, even if the error comes from a module that it calls.
  where = f"{path}, line {lines[-1]}" if lines else str(path)
  hint = (
    "; it must be installed, or lie in the working directory"
    if isinstance(error, ImportError)
    else ""
  )
  return f"{where}: {type(error).__name__}: {text}{hint}"


def explain(config: ConfigDict) -> list[str]:
  """The lines with which preset `weights` tells what it has chosen; none for other presets.

  Args:
    config: the flag's value.
  """
  parser = flags.FLAGS["config"].parser
  told = parser.explanation if isinstance(parser, _Parser) else None
  return told.lines(config) if told else []


class _Parser(flags.ArgumentParser):
  """Loads the config file, and refuses changes to fields that do not exist.

  Attributes:
    explanation: what preset `weights` has chosen; None for other presets.
  """

  def __init__(self, argv: list[str]):
    """Takes the list in which ml_collections looks for --config.FIELD."""
    self._argv = argv
    self.explanation: weights_preset.Explanation | None = None

  def parse(self, argument: str) -> ConfigDict:
    """Loads the config.

    Raises:
      UserError: the file cannot be loaded, or the command line changes a field that does not exist.
    """
    self._argv[:] = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    config = load(argument)
    # Checked before ml_collections applies the changes: its own message for an unknown field does not suggest the right
    # one in another block.
    config.lock()
    for override in filter(None, map(_OVERRIDE.fullmatch, self._argv[1:])):
      _require_field(override["path"], config, argument)
    is_from_file = "preset" in config and config.preset == weights_preset.NAME
    self.explanation = _fill_in(config, self._argv[1:]) if is_from_file else None
    return config


def _fill_in(config: ConfigDict, words: list[str]) -> weights_preset.Explanation:
  """Fills in a config of preset `weights`; `words` are those of the command line.

  Raises:
    UserError: see `weights_preset.fill_in`.
  """
  changes = {}
  for word, following in zip(words, [*words[1:], ""]):
    found = _OVERRIDE.fullmatch(word)
    if found and not found["no"]:
      # absl takes both --config.x=1 and --config.x 1.
      changes[found["path"]] = following if found[3] is None else found[3][1:]
  base = run_file(INSTALLED / "base.py").base(config.stage)
  with config.unlocked():
    return weights_preset.fill_in(config, base, changes, run_file(INSTALLED / "weights.py"))


class _OptionalFloat(flags.FloatParser):
  """Parses a number or None. Whether a field may be None is checked later, with the whole config."""

  # pyrefly: ignore[bad-override]  absl takes any value from a parser, None too
  def parse(self, argument: float | str | None) -> float | None:
    if argument is None or argument == "None":
      return None
    return super().parse(argument)


def _require_field(name: str, config: ConfigDict, spelling: str):
  """Checks that the command line may change a field.

  Raises:
    UserError: the config has no such field, or the field is `preset`, which is chosen in another way.
  """
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
  """Dotted names of all values of a config."""
  for name, value in block.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{where}{name}.")
    else:
      yield where + name
