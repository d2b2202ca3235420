"""What --settings prints, and that docs/settings.md is what it prints now."""

import pathlib
import re
import subprocess
import sys

import pytest

from configs import models
from instructjax.commands import settings
from instructjax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = "--config=configs/ppo_ptx.py --settings=markdown"


def show(*arguments: str):
  return subprocess.run(
    [sys.executable, "-m", "instructjax.main", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_the_document_is_current():
  current = settings.show(models.get("ppo_ptx", None), "markdown") + "\n"
  document = (ROOT / "docs" / "settings.md").read_text()
  again = f"run: python -m instructjax.main {COMMAND} > docs/settings.md"
  assert document == current, again
  assert COMMAND in document  # it names the command itself


def test_the_column_of_base_values_is_not_called_the_papers():
  lines = settings.show(models.get("ppo_ptx", None), "markdown").splitlines()
  heads = {line for line in lines if line.startswith("| setting |")}
  assert heads == {"| setting | base | tiny | source | meaning [unit] |"}
  assert any(line.startswith("- **base**: the value in `configs/base.py`.") for line in lines)


def test_a_setting_has_value_unit_source_and_meaning():
  text = settings.show(models.get("ppo_ptx", None), "config.ppo.max_kl")
  assert re.fullmatch(
    r"ppo\.max_kl = 50\.0 nats a response  \(base 0\.0; open\)\n"
    r"    above this KL .* no limit",
    text,
  )


def test_names_come_before_descriptions():
  names = [
    line.split(" = ")[0]
    for line in settings.show(models.get("ppo_ptx", "gpt3_1p3b"), "KL").splitlines()
    if " = " in line and not line.startswith(" ")
  ]
  assert names[:4] == ["ppo.kl_controller", "ppo.kl_target", "ppo.kl_horizon", "ppo.max_kl"]
  assert "ppo.beta" in names[4:]  # the KL penalty's coefficient, by its description


def test_a_pattern_of_nothing_is_a_mistake():
  with pytest.raises(UserError, match="--settings=zzz: no setting"):
    settings.show(models.get("ppo_ptx", None), "zzz")


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (["--config.ppo.beta=0.5"], "ppo.beta = 0.5 score per nat  (base 0.02; C.4)"),
    (["--config.ppo.value_clip=None"], "ppo.value_clip = None score  (base 0.2; "),
    (["--config.ppo.value_clip=0.3"], "ppo.value_clip = 0.3 score  (base 0.2; "),
    (["--config.rm.optim.clip_norm=None"], "rm.optim.clip_norm = None  (base 1.0; "),
  ],
)
def test_it_shows_what_the_command_line_changes_and_needs_no_workdir(arguments, line):
  done = show("--config=ppo_ptx", *arguments, "--settings")
  assert (done.returncode, done.stderr) == (0, "")
  assert any(shown.startswith(line) for shown in done.stdout.splitlines())
  assert len(re.findall(r"^\S+ = ", done.stdout, re.MULTILINE)) > 150  # all of them


def test_an_optional_number_that_a_preset_has_none_of_can_be_given(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from configs import models\n"
    "def get_config():\n"
    "  config = models.get('rm', None)\n"
    "  config.rm.optim.clip_norm = None\n"
    "  return config\n"
  )
  shown = "--settings=rm.optim.clip_norm"
  done = show(f"--config={tmp_path / 'mine.py'}", "--config.rm.optim.clip_norm=2", shown)
  assert done.stdout.startswith("rm.optim.clip_norm = 2.0"), done.stderr
  done = show(f"--config={tmp_path / 'mine.py'}", shown)
  assert done.stdout.startswith("rm.optim.clip_norm = None"), done.stderr


def test_a_pattern_begins_where_a_word_does():
  """d_model is not in reward_model.num_layers."""
  text = settings.show(models.get("ppo_ptx", None), "d_model")
  names = [line.partition(" = ")[0] for line in text.splitlines() if not line.startswith(" ")]
  assert {"model.d_model", "reward_model.d_model"} <= set(names)
  assert "model.num_layers" not in names and "reward_model.num_layers" not in names
