"""What a resumed run says of its changes."""

import pytest

from instructjax.train.saved_state import read_meta
from tests.train import toy


@pytest.mark.parametrize(
  "changes, told",
  [
    ({}, ""),
    (
      {"execution.remat": "full"},
      "toy goes on with execution.remat=full (was none): results may differ by rounding only\n",
    ),
    (
      {"execution.dtype": "bfloat16", "ppo.packed_rows": 4},
      "toy goes on with execution.dtype=bfloat16 (was float32), ppo.packed_rows=4 (was 0): results"
      " may differ by rounding of bfloat16\n",
    ),
  ],
)
def test_a_run_that_goes_on_otherwise_says_so_in_one_line(tmp_path, capsys, changes, told):
  toy.train(tmp_path, num_steps=4)
  toy.train(tmp_path, run=toy.stage_run(tmp_path, **changes), progress=True)
  printed = capsys.readouterr().out.splitlines(keepends=True)
  assert "".join(line for line in printed if "goes on" in line) == told
  assert read_meta(tmp_path, 10)["changeable"]["rounding"] == toy.EXECUTION | changes


def test_a_run_that_goes_on_under_other_versions_says_so_in_one_line(tmp_path, capsys):
  toy.train(tmp_path, num_steps=4)
  toy.train(tmp_path, num_steps=7, run=toy.stage_run(tmp_path), progress=True)
  assert "goes on" not in capsys.readouterr().out
  later = toy.stage_run(tmp_path, libraries={"jax": "0.12.0", "flax": "0.13"})
  toy.train(tmp_path, run=later, progress=True)
  told = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
  assert told == [
    "toy goes on under jax 0.12.0 (was 0.10.2), flax 0.13 (was absent): results may differ from those of the"
    " old versions"
  ]
  assert read_meta(tmp_path, 10)["changeable"]["libraries"]["jax"] == "0.12.0"
