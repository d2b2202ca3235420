"""`--settings[=PATTERN]`: every setting with its value, unit, source and meaning, as text or as docs/settings.md.

Called by main. Never imports JAX.
"""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from instructjax.commands import config_flag
from instructjax.core import settings
from instructjax.core.config import Config
from instructjax.core.errors import UserError

MARKDOWN = "markdown"
_BASE = config_flag.INSTALLED / "base.py"


@dataclasses.dataclass(frozen=True)
class Setting:
  """One setting of a config.

  Attributes:
    name: dotted, as after --config.
    value: in the config that is shown.
    base: in configs/base.py, the paper's where it prints one.
    source: where the base's value is from: a section of the paper, or "open" where it leaves the value open.
    meaning, unit: see core/settings.py.
  """

  name: str
  value: Any
  base: Any
  source: str
  meaning: str
  unit: str


def define() -> flags.FlagHolder:
  """Defines --settings, whose value may be left out; reading the holder gives None, "" (all) or the pattern."""
  flag = flags.Flag(
    parser=_Pattern(),
    serializer=flags.ArgumentSerializer(),
    name="settings",
    default=None,
    help_string="Print the settings with this in their name or description, all without =..., and end; =markdown"
    " prints docs/settings.md.",
    boolean=True,  # so that absl lets the value be left out
  )
  return flags.DEFINE_flag(flag)


class _Pattern(flags.ArgumentParser):
  def parse(self, argument: str | bool) -> str | None:
    """absl writes true for --settings, and false for --nosettings."""
    text = str(argument)
    spelled: dict[str, str | None] = {"true": "", "false": None}
    return spelled.get(text.lower(), text)


def show(config: ConfigDict, pattern: str) -> str:
  """What --settings prints.

  Raises:
    UserError: no setting has the pattern.
  """
  found = list(collect(config))
  if pattern == MARKDOWN:
    return markdown(found, config.preset)
  wanted = pattern.lower().removeprefix("config.")
  matching = [one for one in found if wanted in one.name.lower()]
  matching += [one for one in found if one not in matching and wanted in one.meaning.lower()]
  if not matching:
    raise UserError(f"--settings={pattern}: no setting has this in its name or description")
  return "\n".join(map(_lines, matching))


def collect(config: ConfigDict) -> Iterator[Setting]:
  """Every setting of a config, with what is written of it.

  Raises:
    UserError: as config_flag.run_file of configs/base.py.
  """
  values = dict(_flat(config.to_dict()))
  base = dict(_flat(config_flag.run_file(_BASE).base(config.stage).to_dict()))
  sources = settings.sources(_BASE.read_text(encoding="utf-8"), "base")
  for name, fact in settings.facts(Config):
    yield Setting(name, values[name], base[name], sources[name], fact.meaning, fact.unit)


def _flat(values: dict, where: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{where}{name}.")
    else:
      yield where + name, value


def _lines(one: Setting) -> str:
  unit = f" {one.unit}" if one.unit else ""
  source = f"; {one.source}" if one.source else ""
  beside = f"  ({one.source})" if one.source else ""
  if one.base != one.value:
    beside = f"  (at the paper's size {one.base}{source})"
  meaning = textwrap.fill(one.meaning, 100, initial_indent="    ", subsequent_indent="    ")
  return f"{one.name} = {one.value}{unit}{beside}\n{meaning}"


def markdown(found: list[Setting], preset: str) -> str:
  """docs/settings.md: a table a block."""
  lines = [
    "# Settings",
    "",
    "Every setting, with its value at the paper's size (`configs/base.py`) and in the preset"
    f" `{preset}`. The source is a section of",
    "the paper, or *open* where the paper leaves the value open. Generated; after a change:",
    "",
    "```bash",
    "python -m instructjax.main --config=configs/ppo_ptx.py --settings=markdown > docs/settings.md",
    "```",
    "",
    "A setting is changed with `--config.NAME=VALUE`. `--settings=PATTERN` prints those whose name or description holds"
    " the pattern,",
    "with the values of the config and flags given beside it.",
  ]
  about, block = dict(settings.blocks(Config)), None
  for one in found:
    here, _, name = one.name.rpartition(".")
    if here != block:
      title = f"`{here}`" if here else "Top level"
      head = f"| setting | paper | {preset} | source | meaning [unit] |"
      said = [_sentence(about[here]), ""] if here else []
      lines += ["", f"## {title}", "", *said, head, "|---|---|---|---|---|"]
      block = here
    unit = f" [{one.unit}]" if one.unit else ""
    value = "" if one.value == one.base else _code(one.value)
    cells = (f"`{name}`", _code(one.base), value, _cell(one.source), _cell(one.meaning + unit))
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _sentence(text: str) -> str:
  return f"{text[:1].upper()}{text[1:]}."


def _code(value: Any) -> str:
  return f"`{value!r}`".replace("|", r"\|")


def _cell(text: str) -> str:
  return re.sub(r"([|<>])", r"\\\1", text)
