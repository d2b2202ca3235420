"""Pushes an export to the Hugging Face hub, with its card as the repository's README. Called by commands/export.py.

The token is that of the library: `hf auth login`, or HF_TOKEN.
"""

import importlib
import pathlib
import re
import shlex
import sys
from typing import Any

from instructjax.core.errors import UserError, reason

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def require(name: str):
  """Checks, without a network, what would stop a push after the export.

  Args:
    name: the repository, as ORG/NAME.
  Raises:
    UserError: the name is none, the `hub` extra is not installed, or there is no token.
  """
  where = f"--push={ascii(name)[1:-1][:200]}"
  if not _NAME.fullmatch(name):
    raise UserError(f"{where} must be ORG/NAME, of letters, digits, '-', '_' and '.'")
  library = _library(where)
  try:
    importlib.import_module("huggingface_hub.utils").validate_repo_id(name)
  except ValueError as error:
    raise UserError(f"{where} must be a name that the hub allows: {reason(error)}") from error
  if library.get_token() is None:
    raise UserError(f"{where} needs a token: run `hf auth login`, or set HF_TOKEN")


def push(out: pathlib.Path, name: str, *, private: bool) -> str:
  """Uploads an export in one commit; a new repository is made if there is none.

  Args:
    out: a Hugging Face folder, or a GGUF file, whose card is FILE.md beside it.
    name: the repository, as ORG/NAME. One that exists keeps its visibility and its other files.
    private: whether a new repository is private.
  Returns:
    Its address.
  Raises:
    UserError: the hub refuses or cannot be reached. What was exported stays.
  """
  library = _library(f"--push={name}")
  if not sys.stderr.isatty():  # bars are for a person
    importlib.import_module("huggingface_hub.utils").disable_progress_bars()
  api = library.HfApi(library_name="instructjax")
  files = _files(out)
  try:
    address = api.create_repo(name, private=private, exist_ok=True)
    operations = [
      library.CommitOperationAdd(path_in_repo=place, path_or_fileobj=path)
      for place, path in files.items()
    ]
    api.create_commit(name, operations, commit_message="Upload with instructjax")
  except Exception as error:  # network, HTTP and validation errors have no common class
    again = f"hf upload {name} {shlex.quote(str(out))}{' --private' if private else ''}"
    raise UserError(
      f"--push={name}: {_why(error, name)}. The export is kept; to push it: {again}"
    ) from error
  return str(address)


def _library(where: str) -> Any:
  try:
    return importlib.import_module("huggingface_hub")
  except ImportError:
    raise UserError(f"{where} needs the hub extra: pip install 'instructjax[hub]'") from None


def _files(out: pathlib.Path) -> dict[str, pathlib.Path]:
  """Place in the repository -> file."""
  if out.is_dir():
    found = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path.relative_to(out).as_posix(): path for path in found}
  return {out.name: out, "README.md": out.with_suffix(".md")}


def _why(error: Exception, name: str) -> str:
  """What went wrong, in the words of somebody who uses the hub."""
  causes: list[Any] = [error]
  while causes[-1].__cause__ is not None:  # the library wraps what happens during an upload
    causes.append(causes[-1].__cause__)
  for cause in causes:
    if hasattr(cause, "response") and cause.response is not None:
      return _refusal(cause, name)
  innermost = causes[-1]
  # The library's own errors have no answer either; those of a network are its HTTP client's.
  is_network = isinstance(innermost, OSError) or type(innermost).__module__.startswith(
    ("http", "requests")
  )
  return f"the hub cannot be reached: {reason(innermost)}" if is_network else reason(error)


def _refusal(error: Any, name: str) -> str:
  status = error.response.status_code
  if status == 401:
    return "the hub does not accept the token (401); run `hf auth login`, or set HF_TOKEN"
  if status == 403:
    owner = name.partition("/")[0]
    return f"the token may not write to {owner} (403); give one that may, with `hf auth login` or HF_TOKEN"
  told = error.server_message if hasattr(error, "server_message") else None
  return f"the hub refuses ({status}): {reason(ValueError(told) if told else error)}"
