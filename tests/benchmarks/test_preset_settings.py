"""Settings of a preset by value, today's and those of a commit."""

import subprocess

import pytest

from benchmarks import preset_settings
from instructjax.core.errors import UserError

CONFIG = "configs/some.py:small"
FILE = """
class Tree(dict):
  def to_dict(self):
    return dict(self)

def get_config(preset):
  return Tree(seed=3, preset=preset, ppo=dict(beta={beta}, rewards=("rm",), optim=dict(rate=1)))
"""


def test_settings_are_flat_and_as_json_has_them():
  found = preset_settings.now("configs/ppo_ptx.py:smollm2")
  assert found["preset"] == "smollm2" and found["ppo.policy_optim.b1"] == 0.9
  assert found["ppo.rewards"] == ["rm"]
  assert "seed" not in found  # of one run
  assert preset_settings.now("configs/ppo_ptx.py")["preset"] == "tiny"


def test_a_commit_has_its_own_settings(tmp_path):
  """Not those of this checkout, and not those of files that nobody committed."""
  path = tmp_path / "configs" / "some.py"
  path.parent.mkdir()
  (path.parent / "__init__.py").write_text("")
  git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
  run = lambda *words: subprocess.run([*git, *words], check=True, capture_output=True, text=True)
  run("init")
  commits = []
  for beta in (0.1, 0.2):
    path.write_text(FILE.format(beta=beta))
    run("add", "configs")
    run("commit", "-m", "a")
    commits.append(run("rev-parse", "HEAD").stdout.strip())
  path.write_text(FILE.format(beta=0.3))
  first, second = (preset_settings.at(commit, CONFIG, tmp_path) for commit in commits)
  assert first == {"preset": "small", "ppo.beta": 0.1, "ppo.rewards": ["rm"], "ppo.optim.rate": 1}
  assert preset_settings.changed(first, second, {}) == ["ppo.beta"]
  with pytest.raises(UserError, match="cannot be read"):
    preset_settings.at("0" * 40, CONFIG, tmp_path)
  with pytest.raises(UserError, match="has no configs/other.py: ModuleNotFoundError"):
    preset_settings.at(commits[0], "configs/other.py", tmp_path)


def test_what_changed():
  then, base = {"a": 1, "b": [1, 2], "c": 3}, {"a": 0, "new": 1}
  assert preset_settings.changed(then, {"a": 1, "b": [1, 3]}, base) == ["b", "c"]
  # One that came later counts where a preset gives it another value than all others have.
  assert preset_settings.changed(then, then | {"new": 1}, base) == []
  assert preset_settings.changed(then, then | {"new": 2}, base) == ["new"]


def test_a_setting_that_the_preset_adopts_is_a_change():
  today = preset_settings.now("configs/ppo_ptx.py:smollm2")
  assert preset_settings.changed(today, today) == []
  for name, expected in (("ppo.share_prompts", ["ppo.share_prompts"]), ("ppo.discount", [])):
    then = {key: value for key, value in today.items() if key != name}
    assert preset_settings.changed(then, today) == expected
