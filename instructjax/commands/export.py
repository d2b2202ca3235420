"""The command `python -m instructjax export --checkpoint=RUN/ppo_ptx --format=hf --out=DIR`.

It writes weights to files for other programs: a Hugging Face folder for transformers, a GGUF file for llama.cpp, or the
adapter alone for peft.
More: docs/generate-and-export.md.
"""

import pathlib
from typing import TYPE_CHECKING, cast

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError

if TYPE_CHECKING:
  from instructjax.models.interop import Dtype, GgufType
  from instructjax.train.weights import Which

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "What to export: a finished stage (runs/demo/ppo_ptx), a Hugging Face folder, a .gguf file,"
  " package:NAME/FILE or hf://ORG/NAME.",
  required=True,
)
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  ["hf", "gguf", "peft"],
  "Hugging Face folder, GGUF file, or an adapter's folder. The first two have adapters merged into their base.",
  required=True,
)
_OUT = flags.DEFINE_string(
  "out",
  None,
  "The new folder, or for GGUF the new FILE.gguf, whose card is FILE.md beside it.",
  required=True,
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  "ema",
  ["ema", "raw", "value"],
  "Of an RL stage: the policy averaged over iterations, the last one, or the value network.",
)
_BASE = flags.DEFINE_string(
  "base", "", "Of an adapter: where its base lies, if not where it was in training."
)
_PUSH = flags.DEFINE_string(
  "push",
  None,
  "Push the export to the Hugging Face hub too, as ORG/NAME; a new repository is private.",
)
_PUBLIC = flags.DEFINE_bool("public", False, "Whether the repository that --push makes is public.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "Numbers of a Hugging Face folder; float32 by default. bfloat16 halves it, rounded to nearest.",
)
_TYPE = flags.DEFINE_enum("type", None, ["f16", "q8_0"], "Numbers of a GGUF file; f16 by default.")


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag is wrong, the checkpoint cannot be read, the output cannot be written, or it cannot be pushed.
  """
  if arguments:
    raise UserError(f"unexpected arguments {arguments}; see --help")
  checkpoint = places.require(_CHECKPOINT.value, "--checkpoint", places.WEIGHTS)
  out, is_gguf = pathlib.Path(places.require(_OUT.value, "--out")), _FORMAT.value == "gguf"
  if is_gguf and out.suffix != ".gguf":
    raise UserError(f"--out={out} must be a file's name that ends in .gguf")
  if _TYPE.value and not is_gguf:
    raise UserError(
      f"--type={_TYPE.value} goes with --format=gguf; a Hugging Face folder has --dtype"
    )
  if _DTYPE.value and _FORMAT.value != "hf":
    raise UserError(
      f"--dtype={_DTYPE.value} goes with --format=hf; a GGUF file has --type, and an adapter is float32"
    )
  if _PUBLIC.value and _PUSH.value is None:
    raise UserError("--public goes with --push=ORG/NAME")
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.serve import hub

  if _PUSH.value is not None:  # before the export, which may take long
    hub.require(_PUSH.value)
  from instructjax.parallel import memory
  from instructjax.serve import packaging

  memory.return_freed_memory()
  # Both flags are enums of just these values.
  which, kind = cast("Which", _WEIGHTS.value), cast("GgufType", _TYPE.value or "f16")
  base = places.expand(_BASE.value, "--base", places.WEIGHTS)
  if is_gguf:
    packaging.write_gguf(checkpoint, out, kind, which=which, base=base)
  elif _FORMAT.value == "peft":
    packaging.write_peft(checkpoint, out, which=which, base=base)
  else:
    dtype = cast("Dtype", _DTYPE.value or "float32")
    packaging.write_huggingface(checkpoint, out, which=which, base=base, dtype=dtype)
  print(f"written: {out}", flush=True)
  if _PUSH.value is not None:
    print(f"pushed: {hub.push(out, _PUSH.value, private=not _PUBLIC.value)}")


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted: no part of an unfinished export is left")
