"""Puts prompts to one or several checkpoints, shows their answers as they come, and scores them with a reward model.

Called by commands/generate.py. Imports no stage.
"""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterable, Iterator

import jax

from instructjax.core import terminal
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError, one_line
from instructjax.core.stages import stage_of_kind
from instructjax.core.text import printable_lines
from instructjax.data import controls
from instructjax.parallel import sharding
from instructjax.serve import speaker
from instructjax.serve.speaker import Answer, Draw, Speaker
from instructjax.train import finished, weights

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of all answers, from the command's flags.

  Attributes:
    draw: how tokens are drawn.
    num_samples: answers of each model to a prompt.
    seed: of the random numbers; each prompt of a session has numbers of its own, and so has each answer to it. The
      first answer is the same whatever their number.
    chat: whether prompts are put into the chat template; None does so if the tokenizer has a template.
    system: system message of a chat; '' for the template's own.
  """

  draw: Draw
  num_samples: int
  seed: int
  chat: bool | None
  system: str

  def validate(self):
    """Checks the ranges.

    Raises:
      UserError: a value is out of its range.
    """
    draw = self.draw
    for name, value, rule, holds in (
      ("temperature", draw.temperature, ">= 0", draw.temperature >= 0),
      ("top_p", draw.top_p, "above 0 and at most 1", 0 < draw.top_p <= 1),
      ("max_new_tokens", draw.max_new_tokens, ">= 1", draw.max_new_tokens >= 1),
      ("num_samples", self.num_samples, ">= 1", self.num_samples >= 1),
      ("seed", self.seed, ">= 0 and below 2**63", 0 <= self.seed < 2**63),
    ):
      if not holds:
        raise UserError(f"--{name}={value} must be {rule}")
    if self.num_samples > 1 and draw.temperature == 0:
      raise UserError(
        f"--num_samples={self.num_samples} must be 1 with --greedy or --temperature=0, where all answers are alike"
      )


@dataclasses.dataclass(frozen=True)
class Panel:
  """The loaded models.

  Attributes:
    speakers: the models that answer.
    judge: the reward model that scores the answers, if there is one.
    chats: those of all these that read prompts in a chat template.
  """

  speakers: list[Speaker]
  judge: Speaker | None
  chats: set[Speaker]


def unescape(text: str) -> str:
  r"""Replaces \n, \t and \\ in a typed prompt, because a typed line cannot contain a newline."""
  return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)


def seat(checkpoints: list[str], reward_model: str, settings: Settings, base: str = "") -> Panel:
  """Loads the checkpoints and the reward model.

  Args:
    checkpoints: paths for `weights.locate`.
    reward_model: another such path, or ''. With '', several stages of one run are scored by the run's own reward model,
      if it is finished.
    settings: the settings of all answers.
    base: of an adapter, where its base lies; '' for the place that is known.
  Raises:
    UserError: a setting is out of its range, a model cannot be opened or loaded, or a chat is asked of a tokenizer
      without a chat template.
  """
  settings.validate()
  opened = [weights.locate(path, base=base) for path in checkpoints]
  reward_model = reward_model or _own_judge(opened)
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  with terminal.loading():
    speakers = [speaker.make(*pair, "lm", mesh) for pair in zip(checkpoints, opened)]
    judge = None
    if reward_model:
      judge = speaker.make(reward_model, weights.locate(reward_model), "scalar", mesh)
  readers = speakers + ([judge] if judge else [])
  chats = {
    reader
    for reader in readers
    if controls.reads_messages(reader.tokenizer.chats, settings.chat, reader.name)
  }
  if settings.system and not chats:
    raise UserError(
      f"--system={settings.system!r} must go with a chat template, and the prompt is read as it is"
    )
  return Panel(speakers, judge, chats)


def _own_judge(opened: list[weights.Weights]) -> str:
  """The path of the run's reward model, if all checkpoints (at least two) are stages of that run; else ''."""
  runs = {given.path.parent if given.kind == "stage" else None for given in opened}
  run = runs.pop()
  if len(opened) < 2 or runs or run is None:
    return ""
  judge = run / stage_of_kind("rm").name
  done = finished.read_done(judge)
  # The stage of a reward model that was given has no weights.
  return str(judge) if done and done.step is not None else ""


def answer_all(panel: Panel, prompts: list[str], settings: Settings):
  """Has every speaker answer each prompt, without memory of the prompts before.

  Raises:
    UserError: a prompt is empty or does not fit the context of a model.
  """
  for number, prompt in enumerate(prompts):
    if len(prompts) > 1:
      print(f"> {printable_lines(prompt)}")
    _answer(panel, [_opening(prompt, settings)] * len(panel.speakers), number, settings)


def converse(panel: Panel, lines: Iterable[str], settings: Settings):
  """Holds a conversation with every speaker, each of which sees its own earlier answers.

  A speaker without a chat template reads only the newest line. Mistakes are printed, and the conversation goes on.
  """
  history = [[] for _ in panel.speakers]
  for number, line in enumerate(lines):
    if line == "/quit":
      break
    if line == "/reset":
      history = [[] for _ in panel.speakers]
      continue
    # Only the first message of a conversation goes with the system message.
    asked = [
      past + [{"role": "user", "content": line}] if past else _opening(line, settings)
      for past in history
    ]
    try:
      answers = _answer(panel, asked, number, settings)
    # For example, the context is full: other questions may still be asked.
    except UserError as error:
      print(f"error: {one_line(error)}", file=sys.stderr)
      continue
    except KeyboardInterrupt:  # stops this answer only, and leaves it out of the history
      print()
      continue
    history = [
      messages + [{"role": "assistant", "content": answer.text}]
      for messages, answer in zip(asked, answers)
    ]


def typed_lines() -> Iterator[str]:
  """Reads lines from the terminal, or from a pipe, until the end; skips empty ones, and those that are not UTF-8."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then has a history and can be edited)
  if sys.stdin is None:  # closed by the shell: <&-
    return
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are found below
  is_terminal = sys.stdin.isatty()
  if is_terminal:
    print(_HELP, file=sys.stderr)
  while True:
    try:
      line = input("> " if is_terminal else "")
    except EOFError:
      return
    try:
      line.encode()
    except UnicodeEncodeError as error:
      place = f"character {error.start + 1}"
      print(f"error: the line is not UTF-8 ({place}) and was left out", file=sys.stderr)
      continue
    if line:
      yield unescape(line)


def _opening(prompt: str, settings: Settings) -> list[dict[str, str]]:
  system = [{"role": "system", "content": settings.system}] if settings.system else []
  return system + [{"role": "user", "content": prompt}]


def _answer(panel: Panel, asked: list[list], number: int, settings: Settings) -> list[Answer]:
  """Puts one prompt to every speaker, and shows answers, scores and speeds.

  All speakers draw with the same random numbers, so that their answers differ by the weights alone.

  Returns:
    The first answer of each speaker.
  """
  key = jax.random.fold_in(jax.random.key(settings.seed), number)
  is_one = len(panel.speakers) * settings.num_samples == 1
  rows, firsts = [], []
  for who, messages in zip(panel.speakers, asked):
    prompt = speaker.prompt_text(who.tokenizer, messages, who in panel.chats)
    for sample in range(settings.num_samples):
      name = _label(who, sample, panel, settings)
      if not is_one:
        terminal.rule(name)
      # The first answer has the key that it would have alone.
      own = jax.random.fold_in(key, sample) if sample else key
      answer = speaker.answer(who, prompt, own, settings.draw, _show)
      print("" if answer.text.endswith("\n") else "\n", end="", flush=True)
      if not answer.text.strip():
        print(_hint(prompt, who in panel.chats), file=sys.stderr)
      rows.append((name, answer, _score(panel, messages, answer)))
      if sample == 0:
        firsts.append(answer)
  if is_one:
    ((_, answer, score),) = rows
    reward = "" if score is None else f"reward {score:+.3f}; "
    print(reward + _speed(answer), file=sys.stderr)
  else:
    terminal.show(_table(rows, "checkpoint" if len(panel.speakers) > 1 else "answer"))
  return firsts


def _label(who: Speaker, sample: int, panel: Panel, settings: Settings) -> str:
  """The name of an answer, above it and in the table."""
  count = f"answer {sample + 1} of {settings.num_samples}" if settings.num_samples > 1 else ""
  name = who.name if len(panel.speakers) > 1 else ""
  return ", ".join(part for part in (name, count) if part)


def _hint(prompt: str, is_chat: bool) -> str:
  """What may be the matter if an answer is empty."""
  if is_chat or prompt.endswith("\n"):
    return "hint: the answer is empty: the model ended it at once"
  return (
    "hint: the answer is empty. A prompt is read exactly as it is: if the prompts of the training data end with a"
    r" newline, end yours with \n"
  )


def _score(panel: Panel, messages: list, answer: Answer) -> float | None:
  """The judge's score of an answer, if there is a judge."""
  if panel.judge is None:
    return None
  # The reward model reads the conversation in its own template, and spells it with its own tokenizer.
  read = speaker.prompt_text(panel.judge.tokenizer, messages, panel.judge in panel.chats)
  return speaker.score(panel.judge, read, answer)


def _show(piece: str):
  """Prints a piece of an answer. What a terminal would obey is shown as an escape, in a pipe too: it may end in one."""
  print(printable_lines(piece), end="", flush=True)


def _rate(num_tokens: int, seconds: float) -> str:
  return f"{num_tokens / seconds:.1f}" if num_tokens else "-"


def _speed(answer: Answer) -> str:
  how = "" if answer.ended else " (cut off)"
  return (
    f"{answer.num_tokens} tokens{how}; prefill"
    f" {_rate(answer.num_prompt_tokens, answer.prefill_seconds)}, decode"
    f" {_rate(answer.num_tokens - 1, answer.decode_seconds)} tokens/s"
  )


def _table(rows: list[tuple[str, Answer, float | None]], what: str) -> terminal.Table:
  """The table of (name, answer, score), with a column of scores if there are any; `what` is the title of the names."""
  is_scored = rows[0][2] is not None
  return terminal.Table(
    columns=[what, *["reward"] * is_scored, "tokens", "prefill/s", "decode/s"],
    rows=[
      [
        name,
        *([] if score is None else [f"{score:+.3f}"]),
        f"{answer.num_tokens}{'' if answer.ended else ' (cut off)'}",
        _rate(answer.num_prompt_tokens, answer.prefill_seconds),
        _rate(answer.num_tokens - 1, answer.decode_seconds),
      ]
      for name, answer, score in rows
    ],
  )
