"""The command that exports: each mistake is one line. What it writes is in tests/serve/test_packaging.py."""

import subprocess
import sys

import pytest

from tests import test_main


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "instructjax", "export", *map(str, arguments)],
    **{"cwd": test_main.ROOT, "env": test_main.ENV, "capture_output": True, "text": True},
    timeout=120,
  )


C, HF, GGUF = "--checkpoint=RUN/sft", "--format=hf", "--format=gguf"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([HF, "--out=OUT"], "--checkpoint must have a value"),
    ([C, "--out=OUT"], "--format must have a value"),
    ([C, HF], "--out must have a value"),
    ([C, "--format=onnx", "--out=OUT"], "value should be one of <hf|gguf>"),
    ([C, GGUF, "--out=OUT"], "must be a file's name that ends in .gguf"),
    ([C, GGUF, "--out=OUT.gguf", "--type=q4_0"], "value should be one of <f16|q8_0>"),
    ([C, HF, "--out=OUT", "--type=f16"], "--type=f16 goes with --format=gguf"),
    ([C, HF, "--out=OUT", "--weights=best"], "value should be one of <ema|raw|value>"),
    ([C, HF, "--out=OUT", "--wieghts=raw"], "Unknown command line flag 'wieghts'"),
    ([C, HF, "--out=OUT", "there"], "unexpected arguments ['there']"),
    (["--checkpoint=RUN/none", HF, "--out=OUT"], "RUN/none must be a Hugging Face folder"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
  fill = lambda text: text.replace("RUN", str(tmp_path / "run")).replace(
    "OUT", str(tmp_path / "out")
  )
  done = command(*map(fill, arguments))
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and fill(message) in line
  assert not list(tmp_path.iterdir())
