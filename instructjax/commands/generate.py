"""The command `python -m instructjax generate --checkpoint=runs/demo/ppo_ptx --prompt='...'`.

It answers prompts with one or several checkpoints. A checkpoint is a finished stage's folder, a Hugging Face folder, a
GGUF file or hf://ORG/NAME. More: docs/generate-and-export.md.
"""

import pathlib

from absl import flags

from instructjax.commands import cli
from instructjax.core import places
from instructjax.core.errors import UserError

_CHECKPOINT = flags.DEFINE_multi_string(
  "checkpoint",
  [],
  "Who answers: a finished stage (runs/demo/ppo_ptx), a Hugging Face folder, a .gguf file,"
  " package:NAME/FILE or hf://ORG/NAME. Several answer the same prompt one after the other.",
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], r"Text of a prompt; \n, \t and \\ in it are replaced. Several are answered in turn."
)
_PROMPT_FILE = flags.DEFINE_multi_string(
  "prompt_file", [], "File whose text is a prompt, exactly as it is."
)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, r"Prompts are read from the terminal, a line each, with \n as in --prompt."
)
_REWARD_MODEL = flags.DEFINE_string(
  "reward_model",
  "",
  "Scores each answer. If none is given, two or more stages of one run are judged by the run's own `rm`.",
)
_BASE = flags.DEFINE_string(
  "base",
  "",
  "Of a checkpoint that is an adapter: where its base lies, if not where it was in training.",
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens with this probability.")
_GREEDY = flags.DEFINE_bool("greedy", False, "The likeliest token each time: --temperature=0.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Longest answer, in tokens.")
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 1, "Answers to each prompt, drawn with different random numbers."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same command with the same seed gives the same text.")
_CHAT = flags.DEFINE_bool(
  "chat",
  None,
  "Whether prompts are a user's messages in the chat template, or text to continue. By default they"
  " are messages where the tokenizer has a template.",
)
_SYSTEM = flags.DEFINE_string("system", "", "System message of a chat.")


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag is wrong, or a checkpoint or prompt file cannot be read.
  """
  if arguments:
    raise UserError(f"unexpected arguments {arguments}; a prompt is given as --prompt='...'")
  if not _CHECKPOINT.value:
    raise UserError("--checkpoint must have a value: runs/demo/ppo_ptx, a model folder or a .gguf")
  checkpoints = [places.require(path, "--checkpoint", places.WEIGHTS) for path in _CHECKPOINT.value]
  reward_model = places.expand(_REWARD_MODEL.value, "--reward_model", places.WEIGHTS)
  texts = [_read(places.require(path, "--prompt_file")) for path in _PROMPT_FILE.value]
  has_prompt = bool(_PROMPT.value or texts)
  if has_prompt == _INTERACTIVE.value:  # neither or both
    raise UserError("one of --prompt, --prompt_file and --interactive must be given")
  if _INTERACTIVE.value and _NUM_SAMPLES.value != 1:
    raise UserError(
      f"--num_samples={_NUM_SAMPLES.value} must be 1 with --interactive: a conversation goes on from one answer"
    )
  # Imported here so that --help and bad flags are answered at once.
  from instructjax.serve import dialogue

  settings = dialogue.Settings(
    draw=dialogue.Draw(
      temperature=0.0 if _GREEDY.value else _TEMPERATURE.value,
      top_p=_TOP_P.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
    ),
    num_samples=_NUM_SAMPLES.value,
    seed=_SEED.value,
    chat=_CHAT.value,
    system=_SYSTEM.value,
  )
  base = places.expand(_BASE.value, "--base", places.WEIGHTS)
  if base and len(checkpoints) > 1:
    raise UserError(f"--base={base} goes with one --checkpoint, got {len(checkpoints)}")
  panel = dialogue.seat(checkpoints, reward_model, settings, base)
  if _INTERACTIVE.value:
    dialogue.converse(panel, dialogue.typed_lines(), settings)
  else:
    prompts = [dialogue.unescape(prompt) for prompt in _PROMPT.value] + texts
    dialogue.answer_all(panel, prompts, settings)


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    reason = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror
    raise UserError(f"--prompt_file={path} cannot be read: {reason}") from error


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
