"""The flag `--settings[=PATTERN]`, which prints settings with their value, unit, source and meaning.

It prints plain text, or the document docs/settings.md. Called by main. Never imports JAX.
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
    name: dotted name, as written after --config.
    value: value in the config that is shown.
    base: value in configs/base.py, which is the paper's if the paper states one.
    source: where the base value comes from: a section of the paper or another work, "open" if the paper leaves it open;
      "" if configs/base.py names none.
    meaning, unit: see core/settings.py.
  """

  name: str
  value: Any
  base: Any
  source: str
  meaning: str
  unit: str


def define() -> flags.FlagHolder:
  """Defines the flag --settings, whose value is optional.

  The holder's value is None without the flag, "" for all settings, or the pattern.
  """
  flag = flags.Flag(
    parser=_Pattern(),
    serializer=flags.ArgumentSerializer(),
    name="settings",
    default=None,
    help_string="Print the settings with this in their name or description, all without =..., and end; =markdown"
    " prints docs/settings.md.",
    boolean=True,  # absl lets the value be omitted only for boolean flags
  )
  return flags.DEFINE_flag(flag)


class _Pattern(flags.ArgumentParser):
  def parse(self, argument: str | bool) -> str | None:
    """Converts the flag's value. absl passes "true" for a bare --settings, and "false" for --nosettings."""
    text = str(argument)
    spelled: dict[str, str | None] = {"true": "", "false": None}
    return spelled.get(text.lower(), text)


def show(config: ConfigDict, pattern: str) -> str:
  """The text that --settings prints.

  Args:
    config: its values are shown.
    pattern: text to look for in names and descriptions, from where a word begins. "" selects all settings, and
      "markdown" the whole document.
  Raises:
    UserError: no setting matches the pattern.
  """
  found = list(collect(config))
  if pattern == MARKDOWN:
    return markdown(found, config.preset)
  wanted = pattern.lower().removeprefix("config.")
  # Matches in the name come first, because they are more likely to be meant.
  # Only from where a word begins: d_model is not in reward_model.
  begins = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}")
  matching = [one for one in found if begins.search(one.name.lower())]
  matching += [one for one in found if one not in matching and begins.search(one.meaning.lower())]
  if not matching:
    raise UserError(f"--settings={pattern}: no setting has this in its name or description")
  return "\n".join(map(_lines, matching))


def collect(config: ConfigDict) -> Iterator[Setting]:
  """Yields every setting of a config, with its documentation from the source."""
  values = dict(_flat(config.to_dict()))
  base = dict(_flat(config_flag.run_file(_BASE).base(config.stage).to_dict()))
  sources = settings.sources(_BASE.read_text(encoding="utf-8"), "base")
  for name, fact in settings.facts(Config):
    yield Setting(name, values[name], base[name], sources[name], fact.meaning, fact.unit)


def _flat(values: dict, where: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) for all values of a nested dict."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{where}{name}.")
    else:
      yield where + name, value


def _lines(one: Setting) -> str:
  """A setting as plain text: name, value and source on one line, and the meaning below."""
  unit = f" {one.unit}" if one.unit else ""
  source = f"; {one.source}" if one.source else ""
  beside = f"  ({one.source})" if one.source else ""
  if one.base != one.value:
    beside = f"  (base {one.base}{source})"
  meaning = textwrap.fill(one.meaning, 100, initial_indent="    ", subsequent_indent="    ")
  return f"{one.name} = {one.value}{unit}{beside}\n{meaning}"


def markdown(found: list[Setting], preset: str) -> str:
  """The text of docs/settings.md, which has one table per config block."""
  lines = [
    "# Settings",
    "",
    "Every setting of a run. Generated; after a change:",
    "",
    "```bash",
    "python -m instructjax.main --config=configs/ppo_ptx.py --settings=markdown > docs/settings.md",
    "```",
    "",
    "A setting is changed with `--config.NAME=VALUE`. `--settings=PATTERN` prints those whose name or description holds"
    " the pattern,",
    "with the values of the config and flags given beside it.",
    "",
    "- **base**: the value in `configs/base.py`. It is the paper's where the source names a section of the paper.",
    f"- **{preset}**: the value in this preset, where it differs.",
    "- **source**: a section of the paper or another work, or *open* (ours) where the paper's recipe needs a value",
    "  that it does not state. Most values without a source follow from others or concern this program only.",
  ]
  about, block = dict(settings.blocks(Config)), None
  for one in found:
    here, _, name = one.name.rpartition(".")
    if here != block:
      title = f"`{here}`" if here else "Top level"
      head = f"| setting | base | {preset} | source | meaning [unit] |"
      said = [_sentence(about[here]), ""] if here else []
      lines += ["", f"## {title}", "", *said, head, "|---|---|---|---|---|"]
      block = here
    unit = f" [{one.unit}]" if one.unit else ""
    value = "" if one.value == one.base else _code(one.value)  # shows only what the preset changes
    cells = (f"`{name}`", _code(one.base), value, _cell(one.source), _cell(one.meaning + unit))
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _sentence(text: str) -> str:
  return f"{text[:1].upper()}{text[1:]}."


def _code(value: Any) -> str:
  return f"`{value!r}`".replace("|", r"\|")


def _cell(text: str) -> str:
  return re.sub(r"([|<>])", r"\\\1", text)
