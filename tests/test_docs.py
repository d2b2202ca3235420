"""What the prose names is there: files that pages link to, config files, modules and test files of commands."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
  str(path.relative_to(ROOT)): path
  for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Placeholders, which the reader fills in: STAGE, NAME and so on.
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\bX\b")


def missing(page: pathlib.Path) -> list[str]:
  """Links, config files, modules and test paths of a page that lead nowhere."""
  text = page.read_text(encoding="utf-8")
  links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text)
  files = [(link, page.parent / link) for link in links if "://" not in link]
  paths = re.findall(r"--config=(configs/\w+\.py)|\bpytest (tests/[\w/]+(?:\.py)?)", text)
  files += [(path, ROOT / path) for pair in paths for path in pair if path]
  modules = re.findall(r"-m ((?:instructjax|launch|benchmarks)(?:\.\w+)*)", text)
  lost = [name for name, path in files if not path.exists() and not PLACEHOLDER.search(name)]
  return lost + [
    name
    for name in modules
    if not PLACEHOLDER.search(name) and importlib.util.find_spec(name) is None
  ]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
  assert not missing(PAGES[page])


def test_what_is_missing_is_found(tmp_path):
  (tmp_path / "there.md").write_text("")
  page = tmp_path / "page.md"
  page.write_text(
    "[a](there.md#part) [b](gone.md) [c](https://gone.org/x.md) --config=configs/gone.py\n"
    "--config=configs/STAGE.py:tiny --config=configs/ppo.py python -m pytest tests/gone -x\n"
    "python -m instructjax.main python -m launch.gone python -m benchmarks.NAME"
  )
  assert missing(page) == ["gone.md", "configs/gone.py", "tests/gone", "launch.gone"]


def test_a_backslash_ends_its_line():
  """Else the shell takes the blank for an argument, and ends the command where the line ends."""
  inside = {name: re.findall(r"\\ +-.*", path.read_text("utf-8")) for name, path in PAGES.items()}
  assert {name: found for name, found in inside.items() if found} == {}


def test_the_two_commands_that_ci_runs_word_for_word():
  """.ci/run takes the README's two lines that start so: first the main job, then the tests."""
  lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
  main_job, tests = [line for line in lines if line.startswith("python3 -m venv")]
  assert "-m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo" in main_job
  assert tests.endswith(".venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest")
