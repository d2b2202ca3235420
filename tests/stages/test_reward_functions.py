"""The user's reward functions: found, called, and refused in one line; and the example of docs/rewards.md."""

import pathlib
import re
import sys

import numpy as np
import pytest

from instructjax.core import rewards
from instructjax.core.errors import UserError
from instructjax.stages import reward_functions
from instructjax.stages.reward_functions import Episodes

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
EPISODES = Episodes(
  prompts=["say sea", "say hill", "say tree"],
  answers=["the sea.", "", "a tree\n\x1b[31m" + "e" * 500],
  ended=[True, True, False],
  prompt_ids=[[1], [1, 2], [3]],
  answer_ids=[[5, 0], [0], [6, 7, 8]],
  iteration=7,
)
MODULE = """
import numpy as np

def lengths(prompts, answers): return [len(a) for a in answers]
def array(prompts, answers): return np.array([True, False, True])
def all_of_them(prompts, answers, **kwargs): return [len(kwargs)] * len(answers)
def two(prompts, answers, *, iteration, answer_ids): return [iteration + len(i) for i in answer_ids]
def spoils(prompts, answers): answers.clear(); return [0.5, 1.5, 2.5]
class Judge:
  def __init__(self): self.calls = 0
  def __call__(self, prompts, answers): return [1.0] * len(answers)
  def score(self, prompts, answers): return [2.0] * len(answers)
judge = Judge()

def nothing(prompts, answers): pass
def number(prompts, answers): return 1.0
def matrix(prompts, answers): return np.zeros((3, 1))
def short(prompts, answers): return [1.0, 2.0]
def nan(prompts, answers): return [0.0, 1.0, float("nan")]
def huge(prompts, answers): return [1e39, 0.0, 0.0]
def none(prompts, answers): return [0.0, None, 0.0]
def text(prompts, answers): return ["0.5"] * 3
def fails(prompts, answers): return [1 / len(a) for a in answers]
def fails_at_once(prompts, answers):
  if len(answers) > 1: raise RuntimeError("a line\\nand \\x1b[31m another " + "x" * 1000)
  return [0.0]
def leaves(prompts, answers): raise SystemExit(0)

CONSTANT = 3
async def later(prompts, answers): return []
def of_one(answers): return []
def of_another(prompts, answers, references): return []
"""


@pytest.fixture
def checks(tmp_path, monkeypatch):
  """A module `checks` in the current folder, which is not in the path; reward(NAME) -> its Function."""
  (tmp_path / "checks.py").write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
  monkeypatch.delitem(sys.modules, "checks", raising=False)
  reward_functions.load.cache_clear()
  yield lambda name: load(f"python:checks:{name}")
  sys.modules.pop("checks", None)
  reward_functions.load.cache_clear()


def load(spelling):
  return reward_functions.load(rewards.parse((spelling,), "config.ppo.rewards")[0])


@pytest.mark.parametrize(
  ("name", "asks", "expected"),
  [
    ("lengths", (), [8, 0, 512]),
    ("array", (), [1, 0, 1]),
    ("all_of_them", reward_functions.ASKED, [4, 4, 4]),
    ("two", ("iteration", "answer_ids"), [9, 8, 10]),
    ("spoils", (), [0.5, 1.5, 2.5]),
    ("judge", (), [1, 1, 1]),
    ("judge.score", (), [2, 2, 2]),
  ],
)
def test_what_a_function_gets_and_gives(checks, name, asks, expected):
  function = checks(name)
  assert set(function.asks) == set(asks)
  found = reward_functions.call(function, EPISODES)
  np.testing.assert_array_equal(found, expected)
  assert found.dtype == np.float32 and len(EPISODES.answers) == 3


def test_the_format_rule_matches_the_whole_answer():
  function = load(r"format:the \w+\.?")
  np.testing.assert_array_equal(reward_functions.call(function, EPISODES), [1, 0, 0])
  assert function.files == ()


def told(call, *arguments):
  with pytest.raises(UserError) as error:
    call(*arguments)
  line = str(error.value)
  assert line.isprintable() and len(line) < 700, line
  return line


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nothing", "returned None, and must return a list or an array with a number for each answer"),
    ("number", "returned 1.0, and must return a list"),
    ("matrix", "returned an array of shape (3, 1) for 3 answers"),
    ("short", "returned 2 values for 3 answers"),
    ("nan", r"returned nan for the answer 'a tree\n\x1b[31m"),
    ("huge", "returned 1e+39 for the answer 'the sea.' to the prompt 'say sea', and must return a"),
    ("none", "returned None for the answer '' to the prompt 'say hill', and must return a finite"),
    ("text", "returned '0.5' for the answer 'the sea.'"),
    ("fails", "raised ZeroDivisionError: division by zero (checks.py, line "),
    ("fails", ") for the answer '' to the prompt 'say hill'"),  # found by asking for each alone
    ("fails_at_once", "raised RuntimeError: a line and "),
    ("fails_at_once", "for a batch that begins with the answer 'the sea.'"),
    ("leaves", "raised SystemExit: 0"),
  ],
)
def test_what_is_wrong_with_what_it_returns(checks, name, message):
  line = told(reward_functions.call, checks(name), EPISODES)
  assert line.startswith(f"ppo.rewards: python:checks:{name}, in iteration 7, ")
  assert message in line and line.endswith(
    "Mend the function and run the same command again: it goes on from the last checkpoint"
  )


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("absent", "checks.py has no 'absent'"),
    ("Lengths", "has no 'Lengths'; did you mean lengths?"),
    (
      "CONSTANT",
      "python:checks:CONSTANT is 3 and no function; it is called as f(prompts, answers)",
    ),
    ("Judge", "python:checks:Judge is a class"),
    ("later", "must return its floats, not a coroutine"),
    ("of_one", "python:checks:of_one(answers): too many positional arguments; it is called as f("),
    (
      "of_another",
      "missing a required argument: 'references'; it is called as f(prompts, answers)",
    ),
  ],
)
def test_what_cannot_be_called_is_refused_before_anything_trains(checks, name, message):
  assert message in told(checks, name)


def test_a_module_that_cannot_be_imported(tmp_path, checks):
  line = told(load, "python:no_such_module:fn")
  assert "cannot import no_such_module: ModuleNotFoundError: No module named" in line
  assert "the current folder, PYTHONPATH and the installed packages were searched" in line
  for name, text, message in (
    ("broken", "def f(:\n", "SyntaxError: invalid syntax"),
    ("script", "import sys\nsys.exit(3)", "SystemExit: 3 (script.py, line 2)"),
    ("needs", "import no_such_thing", "No module named 'no_such_thing' (needs.py, line 1)"),
  ):
    (tmp_path / f"{name}.py").write_text(text)
    assert message in told(load, f"python:{name}:fn")


def test_the_checksum_is_that_of_the_file_as_it_was_imported(tmp_path, checks):
  first = checks("lengths")
  assert first.files == (str(tmp_path / "checks.py"),) and len(first.checksum) == 64
  (tmp_path / "checks.py").write_text("# edited while the run goes on")
  assert checks("lengths").checksum == first.checksum


def test_the_example_of_the_docs(tmp_path, monkeypatch):
  (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
  spelled, of_ensemble = re.findall(r"--config\.ppo\.rewards='\((.*)\)'", PAGE)
  assert rewards.has_ensemble(rewards.parse(re.findall(r'"(.*?)"', of_ensemble), "rewards"))
  listed = rewards.parse(re.findall(r'"(.*?)"', spelled), "config.ppo.rewards")
  assert [one.kind for one in listed] == ["rm", "python", "length"]
  (tmp_path / "checks.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "checks", raising=False)
  reward_functions.load.cache_clear()
  function = reward_functions.load(listed[1])
  np.testing.assert_array_equal(reward_functions.call(function, EPISODES), [1, 0, 0])
  for name in reward_functions.ASKED:
    assert f"`{name}`" in PAGE
