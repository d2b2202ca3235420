"""What the fuzz command tries: for each target what makes its inputs, what reads one, and its share of all inputs."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import (
  command_lines,
  data_files,
  state_files,
  template_files,
  tokenizer_files,
  weight_files,
)
from tests.fuzz.mutants import Files


class Target(NamedTuple):
  """A reader and its inputs.

  Attributes:
    cases: yields (name, files of a folder) without end; the generator of random numbers decides everything.
    run: reads such a folder as a run would. It returns, or raises a UserError of one line; anything else is a finding.
    share: of the inputs of all targets, relative to the other shares.
  """

  cases: Callable[[random.Random], Iterator[tuple[str, Files]]]
  run: Callable[[Path], object]
  share: int


_of = state_files.mutants_of
TARGETS = {
  "data": Target(data_files.cases, data_files.run, 30),
  "tokenizers": Target(tokenizer_files.cases, tokenizer_files.run, 20),
  "templates": Target(template_files.cases, template_files.run, 5),
  "weights": Target(weight_files.cases, weight_files.run, 20),
  "commands": Target(command_lines.cases, command_lines.run, 10),
  "done": Target(_of(state_files.done_files), state_files.read_done, 3),
  "checkpoints": Target(_of(state_files.checkpoint_files), state_files.read_checkpoints, 3),
  "metrics": Target(_of(state_files.metric_files), state_files.read_metrics, 3),
  "checksums": Target(_of(state_files.checksum_files), state_files.read_checksums, 2),
  "tokens": Target(_of(state_files.token_files), state_files.read_tokens, 3),
  "programs": Target(_of(state_files.program_files), state_files.read_programs, 1),
}


def case(target: str, seed: int, number: int) -> Files:
  """The files of an input, whichever others are made."""
  return next(TARGETS[target].cases(random.Random(f"{seed} {target} {number}")))[1]
