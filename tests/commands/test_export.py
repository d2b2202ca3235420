"""The command that exports: each mistake is one line. What it writes is in tests/serve/test_packaging.py."""

import pathlib
import subprocess
import sys

import pytest

from tests import test_main

# The command with an export that takes no time.
QUICK = """
import sys
from instructjax.serve import packaging
def write(checkpoint, out, which, base, dtype):
  out.mkdir()
  (out / "README.md").write_text("# A\\n")
packaging.write_huggingface = write
from instructjax import __main__
__main__.main()
"""


def command(*arguments, quick=False, **env):
  program = ["-c", QUICK] if quick else ["-m", "instructjax"]
  return subprocess.run(
    [sys.executable, *program, "export", *map(str, arguments)],
    **{"cwd": test_main.ROOT, "env": test_main.ENV | env, "capture_output": True, "text": True},
    timeout=120,
  )


C, HF, GGUF = "--checkpoint=RUN/sft", "--format=hf", "--format=gguf"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([HF, "--out=OUT"], "--checkpoint must have a value"),
    ([C, "--out=OUT"], "--format must have a value"),
    ([C, HF], "--out must have a value"),
    ([C, "--format=onnx", "--out=OUT"], "value should be one of <hf|gguf|peft>"),
    ([C, GGUF, "--out=OUT"], "must be a file's name that ends in .gguf"),
    ([C, GGUF, "--out=OUT.gguf", "--type=q4_0"], "value should be one of <f16|q8_0>"),
    ([C, HF, "--out=OUT", "--type=f16"], "--type=f16 goes with --format=gguf"),
    ([C, GGUF, "--out=OUT.gguf", "--dtype=bfloat16"], "--dtype=bfloat16 goes with --format=hf"),
    ([C, HF, "--out=OUT", "--dtype=f16"], "value should be one of <float32|bfloat16>"),
    ([C, HF, "--out=OUT", "--weights=best"], "value should be one of <ema|raw|value>"),
    ([C, HF, "--out=OUT", "--wieghts=raw"], "Unknown command line flag 'wieghts'"),
    ([C, HF, "--out=OUT", "--push=name"], "--push=name must be ORG/NAME"),
    ([C, HF, "--out=OUT", "--public"], "--public goes with --push=ORG/NAME"),
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


def test_an_export_that_cannot_be_pushed_stays(tmp_path):
  pytest.importorskip("huggingface_hub")
  out = tmp_path / "out"
  # Nothing listens at port 9.
  env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}
  done = command(C, HF, f"--out={out}", "--push=org/name", quick=True, **env)
  assert (done.returncode, done.stdout) == (2, f"written: {out}\n")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: --push=org/name: the hub cannot be reached: ")
  assert line.endswith(f"The export is kept; to push it: hf upload org/name {out} --private")
  assert [path.name for path in pathlib.Path(out).iterdir()] == ["README.md"]


def test_without_a_token_nothing_is_exported(tmp_path):
  pytest.importorskip("huggingface_hub")
  env = {"HF_TOKEN": "", "HF_HOME": str(tmp_path)}
  done = command(C, HF, f"--out={tmp_path / 'out'}", "--push=org/name", quick=True, **env)
  assert (done.returncode, done.stdout) == (2, "")
  assert (
    done.stderr == "error: --push=org/name needs a token: run `hf auth login`, or set HF_TOKEN\n"
  )
  assert not (tmp_path / "out").exists()
