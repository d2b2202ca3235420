"""The preset `weights`: shapes from the file, the user's changes over everything, and what is refused."""

import dataclasses
import subprocess

import pytest

from configs import base, models, weights
from instructjax.commands import weights_preset
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError
from tests import tiny

LLAMA = dataclasses.asdict(dataclasses.replace(tiny.LLAMA, max_length=64, init_std=0.5))
GPT2 = dataclasses.asdict(dataclasses.replace(tiny.GPT2, max_length=48))


@pytest.fixture
def asked(monkeypatch):
  """Stands for describe.py: a Llama at `there`, a GPT-2 elsewhere. Holds what was asked."""
  log = []

  def ask(paths, tokenizer_path):
    log.append((dict(paths), tokenizer_path))
    shape = lambda path: LLAMA if path == "/there" else GPT2
    found = {
      field: {"network": shape(path), "head": "lm", "num_params": 5000}
      for field, path in paths.items()
    }
    return {"vocab_size": 77, "weights": found}

  monkeypatch.setattr(weights_preset, "_ask", ask)
  return log


def fill_in(changes, stage="ppo_ptx", **own):
  """(config, explanation) of the preset with changes of the command line, and `own` ones of a config file."""
  config = models.get(stage, "weights")
  for block, values in own.items():
    config[block].update(values)
  told = weights_preset.fill_in(config, base.base(stage), changes, weights)
  return config, told


def test_the_file_gives_shape_context_and_vocabulary(asked):
  config, _ = fill_in({"model.weights": "/there"})
  frozen = from_config_dict(config)
  assert dataclasses.asdict(frozen.model.network) == LLAMA
  assert frozen.same_network
  assert frozen.tokenizer.vocab_size == 77
  assert frozen.data.max_prompt_length + frozen.data.max_response_length == 64
  assert asked == [({"model.weights": "/there"}, "")]


def test_a_reward_model_of_its_own(asked):
  """The shorter of the two contexts bounds prompts and answers."""
  changes = {
    "model.weights": "/there",
    "reward_model.weights": "/other",
    "tokenizer.path": "/tokenizer.json",
  }
  config, told = fill_in(changes)
  assert config.reward_model.position == "learned" and config.model.position == "rope"
  assert config.data.max_prompt_length == 24 and config.ppo.ptx_length == 48
  assert asked[0][1] == "/tokenizer.json"
  assert told.heading[1].endswith("from /there") and told.heading[2].endswith("from /other")


def test_a_finished_policy_is_start_and_baseline_where_no_base_is_named(asked):
  for given, other in (("sft", "ppo_init"), ("ppo_init", "sft")):
    config, told = fill_in({f"{given}.weights": "/there"})
    assert config[other].weights == "/there" and config.model.d_model == LLAMA["d_model"]
    assert any(line.startswith(f"  {other}.weights=/there: no base") for line in told.heading)
    config, told = fill_in({f"{given}.weights": "/there", "model.weights": "/base"})
    assert config[other].weights == "" and len(told.heading) == 3
    # The finished policy's shape and tokenizer come first.
    assert list(asked[-1][0]) == [f"{given}.weights", "model.weights"]
  config, _ = fill_in({"sft.weights": "/there", "ppo_init.weights": "/also"})
  assert (config.sft.weights, config.ppo_init.weights) == ("", "")  # the flags set them later


def test_microbatches_follow_batches_of_the_flags_and_of_a_config_file(asked):
  changes = {"model.weights": "/there", "ppo.batch_size": "24", "ppo.num_minibatches": "2"}
  config, _ = fill_in(changes, ppo=dict(ptx_rows=2), sft=dict(batch_size=16))
  assert (config.sft.microbatches, config.ppo.microbatches) == (2, 2)  # 12 episodes in 6 each
  assert (config.ppo.ptx_microbatches, config.ppo.score_microbatches) == (3, 3)  # of 24 rows
  fill_in(changes | {"ppo.batch_size": "many"})  # which ml_collections refuses later


def test_a_run_of_the_reward_model_alone_needs_no_policy(asked):
  for field in ("rm.weights", "reward_model.weights"):
    config, told = fill_in({field: "/there"}, "rm")
    assert config.model.d_model == config.reward_model.d_model == LLAMA["d_model"]
    assert config.sft.weights == config.ppo_init.weights == "" and len(told.heading) == 3
    with pytest.raises(UserError, match="name it with --config.model.weights=PATH"):
      fill_in({field: "/there"})


def test_a_shorter_context_is_followed(asked):
  config, _ = fill_in({"model.weights": "/there", "model.max_length": "32"})
  assert config.data.max_prompt_length == 16 and config.sft.length == 32


def test_what_a_config_file_has_set_stays(asked):
  config, told = fill_in(
    {}, model=dict(weights="/there"), sft=dict(batch_size=3), tokenizer=dict(vocab_size=5)
  )
  assert (config.sft.batch_size, config.tokenizer.vocab_size, config.model.d_model) == (3, 5, 16)
  assert any("sft.batch_size=3: yours" in line for line in told.lines(config))


def test_the_lines_name_each_value_with_its_reason_once(asked):
  config, told = fill_in({"model.weights": "/there"})
  config.ppo.batch_size = 64  # as ml_collections does later
  lines = told.lines(config)
  assert len(lines) <= 15 and all("\n" not in line for line in lines)
  text = "\n".join(lines)
  assert "sft.optim.learning_rate=9.65e-06, sft.batch_size=32: C.1, 1.3B" in text
  assert "ppo.num_minibatches=8: C.4" in text and "ppo.batch_size=64: yours" in text
  assert text.count("ppo.batch_size=") == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "name it with --config.model.weights=PATH"),
    ({"model.d_model": "32"}, "--config.model.d_model=32 contradicts /there, which has d_model=16"),
    ({"model.max_length": "65"}, "--config.model.max_length=65 contradicts"),
    ({"model.max_length": "0x10"}, "--config.model.max_length=0x10 contradicts"),
    ({"model.tie_embeddings": "true"}, "--config.model.tie_embeddings=true contradicts"),
    ({"model.rope_scaling.kind": "linear"}, "--config.model.rope_scaling.kind=linear contradicts"),
    ({"reward_model.num_layers": "9"}, "--config.reward_model.num_layers=9 contradicts /there"),
    ({"reward_model.weights": "/other", "reward_model.max_length": "8"}, "contradicts /other"),
  ],
)
def test_contradictions_are_one_line(asked, changes, message):
  with pytest.raises(UserError, match="^[^\n]*$") as error:
    fill_in(changes | ({"model.weights": "/there"} if changes else {}))
  assert message in str(error.value)


@pytest.mark.parametrize(
  "changes",
  [
    {"model.d_model": "16", "model.norm": "rmsnorm", "model.use_bias": "False"},
    {"model.norm_eps": "0.00001", "model.init_std": "3", "model.tie_embeddings": "f"},
  ],
)
def test_saying_what_the_file_says_is_fine(asked, changes):
  fill_in(changes | {"model.weights": "/there"})


def test_an_error_of_the_reading_process_is_passed_on(monkeypatch):
  answers = iter(
    [(0, 'a note\n{"error": "config.model.weights: it is no file"}\n'), (1, ""), (0, "")]
  )

  def run(command, **kwargs):
    assert kwargs["env"]["JAX_PLATFORMS"] == "cpu"  # an accelerator is left to the run
    return subprocess.CompletedProcess(command, *next(answers))

  monkeypatch.setattr(subprocess, "run", run)
  with pytest.raises(UserError, match="it is no file"):
    weights_preset._ask({"model.weights": "/x"}, "")
  for code in (1, 0):
    with pytest.raises(ValueError, match=f"ended with exit code {code}"):
      weights_preset._ask({"model.weights": "/x"}, "")
