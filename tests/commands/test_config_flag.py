"""The --config flag: which file is meant, what a bad one is told to be, and which fields may be changed."""

import pathlib
import re

import pytest

from instructjax.commands import config_flag
from instructjax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = (
  "from configs import models\ndef get_config(preset=None):\n  return models.get('rm', preset)\n"
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """An empty working directory."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


# --- which file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["ppo_ptx", "ppo_ptx.py", "configs/ppo_ptx", "configs/ppo_ptx.py", "./configs/ppo_ptx.py"]
)
def test_a_path_that_is_not_here_is_looked_up_among_the_installed(elsewhere, name):
  assert config_flag.locate(name) == ROOT / "configs" / "ppo_ptx.py"
  assert config_flag.load(f"{name}:gpt2").preset == "gpt2"
  assert config_flag.load(name).preset == "tiny"


@pytest.mark.parametrize("file", ["ppo_ptx.py", "configs/ppo_ptx.py"])
def test_a_file_of_the_users_own_wins(elsewhere, file):
  path = elsewhere / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(CONFIG)
  assert config_flag.load("ppo_ptx").stage == "rm"  # what the file says
  assert config_flag.load(file).stage == "rm"


def test_a_folder_of_the_configs_name_does_not_hide_it(elsewhere):
  (elsewhere / "ppo_ptx").mkdir()  # as a workdir may be called
  assert config_flag.load("ppo_ptx").stage == "ppo_ptx"


def test_other_folders_are_not_looked_up(elsewhere):
  with pytest.raises(UserError, match="--config=mine/ppo_ptx.py: there is no such file here"):
    config_flag.locate("mine/ppo_ptx.py")


def test_what_is_not_found_is_said_with_what_there_is(elsewhere):
  every = "best_of_n, evaluate, grpo, ppo, ppo_init, ppo_ptx, pretrain, rloo, rm, sft"
  with pytest.raises(UserError, match=f"--config=ppo_pxt: .*come with instructjax: {every}$"):
    config_flag.locate("ppo_pxt")


# --- a file that fails ----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("def get_config(:\n", "mine.py, line 1: invalid syntax"),
    ("x = 1\n", "mine.py is no config: it has no get_config"),
    ("import configs.nothing\n", "mine.py, line 1: ModuleNotFoundError: No module named 'configs.nothing'"),
    ("def get_config():\n  x = 1\n  return y\n", "mine.py, line 3: NameError: name 'y' is not defined"),
    ("def get_config():\n  return None\n", "must return an ml_collections.ConfigDict, got NoneType"),
    ("def get_config(preset):\n  return {}[preset]\n", "mine.py: TypeError: get_config() missing 1 required"),
    (
    "from instructjax.core.errors import UserError\ndef get_config():\n  raise UserError('size must be\\n odd')\n",
    "--config=mine.py: size must be odd",
  ),
  (b"\x80\x00binary", "mine.py: source code string cannot contain null bytes: it is not a Python file"),
  (r"\d \s \w".replace(" ", "\n") + "\n", "mine.py, line 1: unexpected character after line continuation"),
  ("# Title\nSome text, no code.\n", "mine.py, line 2: invalid syntax: it is not a Python file"),
  ("raise SystemExit(3)\n", "mine.py, line 1: SystemExit: 3"),
  ("def get_config():\n  raise ValueError('odd' * 10**6)\n", "ValueError: oddodd"),
  ("def get_config():\n  raise ValueError('odd')\n", "mine.py, line 2: ValueError: odd"),
  (
    "from configs import models\ndef get_config():\n  return models.get('rm', 'x')\n",
    "--config=mine.py: preset 'x' must be one of tiny, ",
  ),
    ("def get_config():\n  return open('/none')\n", "mine.py, line 2: FileNotFoundError: "),
    (b"x = '\xff'\n", "mine.py"),
    ("from configs import base\ndef get_config():\n  c = base.base('rm')\n  c.sede = 1\n  return c\n", None),
  ],
)  # fmt: skip
def test_a_config_file_that_fails_is_one_line(elsewhere, content, message):
  data = content if isinstance(content, bytes) else content.encode()
  (elsewhere / "mine.py").write_bytes(data)
  if message is None:  # whether the fields are right is seen when the config is built
    assert config_flag.load("mine.py").sede == 1
    return
  with pytest.raises(UserError) as error:
    config_flag.load("mine.py")
  text = str(error.value)
  assert text.startswith("--config=mine.py: ")
  assert message in text and "\n" not in text and len(text) < 1000


@pytest.mark.parametrize(
  "name, reason",
  [("x" * 300, "too long"), ("a\0b", "control character"), ("~nobody-here/x.py", "no such user")],
)
def test_what_can_be_no_path_is_one_line(elsewhere, name, reason):
  with pytest.raises(UserError, match=reason):
    config_flag.load(name)


def test_a_config_in_the_home_folder(elsewhere, monkeypatch):
  monkeypatch.setenv("HOME", str(elsewhere))
  (elsewhere / "mine.py").write_text(CONFIG)
  assert config_flag.load("~/mine.py").stage == "rm"


@pytest.mark.parametrize("name", ["", "configs"])
def test_no_file_or_a_folder(monkeypatch, name):
  monkeypatch.chdir(ROOT)
  with pytest.raises(UserError, match=re.escape(f"--config={name} ")):
    config_flag.load(name)
