"""Hostile command lines of the main command: fields x nasty values, and what reading one must do. No run is started."""

import json
import pathlib
import random
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from instructjax import main as command
from instructjax.commands import cli
from instructjax.core import blocks
from instructjax.core.config import Config
from instructjax.core.errors import UserError, one_line
from instructjax.stages import lineage, room
from tests.fuzz.mutants import Files

ARGUMENTS = "arguments.json"
_GIB = 2**30
_ONE = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1}

NUMBERS = (
  *("0", "-0", "1", "-1", "2", "3", "7", "1e0", "0.5", "-0.5", "1e-3", "1e-8", "1e-38", "1e-46"),
  *("1e38", "3.5e38", "1e308", "1e309", "-1e309", "inf", "-inf", "+inf", "Infinity", "nan", "-nan"),
  *("NaN", "2147483647", "2147483648", "-2147483648", "-2147483649", "9223372036854775807"),
  *("9223372036854775808", "1000000000", "1000000", "99999999999999999999999999", "1" * 5000),
  *("0x10", "1_000", "1,000", "٣", "１", "1.", ".5", "1e", "--1", "+5", " 5", "5 ", "1e5000"),
)
WORDS = (
  *("", " ", "None", "none", "null", "True", "true", "False", "[]", "{}", "()", "('ppo',)", "ppo"),
  *(
    "'",
    '"',
    "\\",
    "\n",
    "a\nb",
    "\t",
    "\x1b[31m",
    "\x7f",
    "\u202e",
    "\udcff",
    "é",
    "数据",
    "[/b]",
  ),
  *("x" * 300, "x" * 5000, "a/" * 3000, "=", "==", "a=b", "--config", "%s", "{0}", "$HOME", "`id`"),
  *("ppo,ppo_ptx", "('ppo', 'sft')", "[1, 2]", "(" * 200, "lambda: 0", "__import__('os')", "1:2"),
  *(
    "3:5",
    "5:3",
    "999999999999:9999999999999",
    "-1:5",
    "٣:٥",
    "tiny",
    "float32",
    "sft",
    "evaluate",
  ),
)
PLACES = (
  *("~", "~/x", "~root/x", "~nobody-here/x", "/", "/dev/null", "/proc/self/mem", "."),
  *("..", "gs://b/x", "s3://b", "hf://", "hf://a", "hf://a/b", "http://a/b", "file:///tmp", "://"),
  *("jsonl:", "jsonl:~/x", "jsonl:gs://b/x", "jsonl:/none", "demo:", "demo:x", "parquet:/none/*"),
  *(
    "datasets:a/b",
    "jsonl:" + "x" * 300,
    "jsonl:a\nb",
    ":",
    "::",
    "nothing:x",
    "JSONL:/x",
    "jsonl",
  ),
)
FLAGS = (
  *("workdir", "coordinator", "num_processes", "process_id", "settings", "config", "flagfile"),
  *("verbosity", "help", "nothing", "config.nothing", "config.ppo", "config.", "config..a", "-"),
)
COORDINATORS = (
  *("h:1", "h:0", "h:-1", "h:65536", "h:", ":1", "h", "[::1]:80", "h:1:2", "h:٣", "h\n:1", "h:1e3"),
)


def line(rng: random.Random) -> list[str]:
  """A command line: a config, a workdir, and one to four changes that are mostly nasty."""
  stage = rng.choice(("pretrain", "sft", "rm", "ppo", "ppo_ptx", "evaluate"))
  preset = rng.choice(("", "", "", ":tiny", ":gpt2", ":gpt3_1p3b", ":llama3_8b", ":huge", ":"))
  result = [f"--config={stage}{preset}"]
  if rng.random() < 0.9:
    place = f"/tmp/fuzz/{rng.randrange(10)}" if rng.random() < 0.8 else rng.choice(PLACES + WORDS)
    result.append(f"--workdir={place}")
  known = list(blocks.leaves(Config))
  for _ in range(rng.randint(1, 4)):
    kind = rng.random()
    if kind < 0.8:
      name = rng.choice(known)
      values = (
        PLACES if name.startswith("data.") or "weights" in name or "path" in name else NUMBERS
      )
      value = rng.choice(values if rng.random() < 0.7 else NUMBERS + WORDS + PLACES)
      result.append(rng.choice(("--", "--", "--", "-")) + f"config.{name}={value}")
    elif kind < 0.9:
      result.append(f"--coordinator={rng.choice(COORDINATORS + WORDS)}")
      result.append(f"--num_processes={rng.choice(NUMBERS)}")
      result.append(f"--process_id={rng.choice(NUMBERS)}")
    elif kind < 0.97:
      result.append(f"--{rng.choice(FLAGS)}={rng.choice(NUMBERS + WORDS + PLACES)}")
    else:
      result.append(rng.choice(NUMBERS + WORDS + PLACES))
  return result


def answer(arguments: Sequence[str]):
  """Reads a command line as the main command does, up to where it would start to work.

  Raises:
    UserError: the command line is refused.
  """
  for name in [name for name in flags.FLAGS if name.startswith("config.")]:
    delattr(flags.FLAGS, name)  # the last command line's
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  argv = ["main", *arguments]
  before, sys.argv = sys.argv, argv
  try:
    rest = cli._parse(argv)
    config, workdir, _ = command.read(rest[1:])
    room.require(config, _ONE, lineage.plan(config), 64 * _GIB, "this machine")
    del workdir
  finally:
    sys.argv = before


def cases(rng: random.Random) -> Iterator[tuple[str, Files]]:
  """Yields (the line, the arguments in a file) without end."""
  while True:
    arguments = line(rng)
    yield ascii(arguments)[:200], {ARGUMENTS: json.dumps(arguments).encode()}


def run(folder: pathlib.Path):
  """Reads a case as the main command does.

  Raises:
    UserError: the command line is refused; its message as it is printed.
    AssertionError: it ends the command with another exit code than 0.
  """
  try:
    answer(json.loads((folder / ARGUMENTS).read_bytes()))
  except UserError as error:  # quotes what was typed, and is cut where it is printed
    raise UserError(one_line(error)) from error
  except SystemExit as error:  # --help
    assert error.code in (0, None), f"exit code {error.code}"
