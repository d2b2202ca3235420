"""Opening whatever lies at a path: a value or one line, in bounded time, whatever the files hold."""

import json
import random
import time

import pytest

from instructjax.core.errors import UserError
from instructjax.models import interop
from tests.fuzz import mutants, weight_files


@pytest.mark.parametrize("name", weight_files.seeds())
def test_seeds_open(name, tmp_path):
  """Otherwise mutants of them would be refused for another reason than their damage."""
  mutants.write(tmp_path, weight_files.seeds()[name])
  weight_files.run(tmp_path)


def test_mutants(tmp_path):
  opened = 0
  for seed in range(300):
    what, files = next(weight_files.cases(random.Random(seed)))
    folder = tmp_path / str(seed)
    folder.mkdir()
    mutants.write(folder, files)
    start = time.process_time()
    try:
      weight_files.run(folder)
      opened += 1
    except UserError as error:
      assert not mutants.bad_message(error, folder), f"mutant {seed} of {what}"
    except Exception as error:
      raise AssertionError(f"mutant {seed} of {what}") from error
    assert time.process_time() - start < 5, f"mutant {seed} of {what}"
  assert 5 < opened < 150, "mutants are near enough to what is valid, and far enough"


@pytest.mark.parametrize(
  "family, name, value",
  [
    ("llama", "num_hidden_layers", 10**6),
    ("gpt2", "n_layer", 10**9),
    ("llama", "num_hidden_layers", 1),
    ("llama", "vocab_size", 2**31 - 1),
    ("llama", "intermediate_size", 2**31 - 1),
    ("qwen2", "hidden_size", 2**30),
    ("gpt2", "n_positions", 10**9),
  ],
)
def test_sizes_are_compared_with_the_tensors_before_anything_is_built(
  family, name, value, tmp_path
):
  files = dict(weight_files.seeds()[family])
  files["config.json"] = json.dumps(json.loads(files["config.json"]) | {name: value}).encode()
  mutants.write(tmp_path, files)
  source = interop.open_weights(tmp_path)
  start = time.process_time()
  with pytest.raises(UserError, match="the config must fit the weights|and the model needs"):
    interop.describe(source)
  assert time.process_time() - start < 1
