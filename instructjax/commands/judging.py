"""The flags that the commands `preference` and `rewards` share. Called by these two."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from instructjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
  """What `define` has defined."""

  out: flags.FlagHolder
  bootstrap: flags.FlagHolder
  seed: flags.FlagHolder

  def values(self) -> dict[str, Any]:
    """Name -> value."""
    return {"out": self.out.value, "bootstrap": self.bootstrap.value, "seed": self.seed.value}


def define(out: str, seed: str) -> Flags:
  """Defines the flags; `out` and `seed` say what the command writes, and what it draws."""
  return Flags(
    flags.DEFINE_string("out", "", out),
    flags.DEFINE_integer(
      "bootstrap", 1000, "Resamples of the prompts for intervals.", lower_bound=2
    ),
    flags.DEFINE_integer("seed", 0, seed, lower_bound=0),
  )


def refuse(arguments: Sequence[str]):
  """Checks that the command line holds flags only.

  Raises:
    UserError: it does not.
  """
  if arguments:
    raise UserError(f"unexpected arguments {ascii(list(arguments))[:200]}; see --help")
