"""The benchmarks' commands, as far as they need no library that the tests do without."""

import contextlib
import json
import pathlib
import sys

import pytest

from benchmarks import parity, ppo_iteration, reward_split, rm_rows, slots, startup
from configs import models
from instructjax.core import rewards
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError


def test_parity_says_in_one_line_which_extra_it_needs(monkeypatch, capsys):
  for name in ("torch", "transformers", "accelerate"):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
  assert parity.main([]) == 2
  printed = capsys.readouterr()
  assert (printed.out, printed.err.count("\n")) == ("", 1)
  assert "torch and transformers and accelerate must be installed" in printed.err
  assert "instructjax[compare]" in printed.err


@pytest.mark.parametrize(
  ("value", "theirs", "code"),
  [(4e-4, 0.0, 0), (6e-4, 1e-4, 1), (6e-4, 3e-4, 0), (1e-3, 3e-4, 1), (float("nan"), 3e-4, 1)],
)
def test_a_broken_bound_is_marked_and_ends_the_command_with_1(
  monkeypatch, capsys, value, theirs, code
):
  """Logits may be 5e-4 from the exact ones, or three times as far as the other program's."""
  monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: name)
  row = {"left": value, "theirs": theirs, "greedy": 0}
  monkeypatch.setattr(parity, "cases", lambda gguf, texts: [("one", row)])
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets it
  assert parity.main([]) == code
  printed = capsys.readouterr().out
  assert ("!" in printed) == bool(code)
  assert ('"broken": ["one: left"]' in printed) == bool(code)


def test_text_without_a_tokenizer_is_refused(capsys):
  with pytest.raises(SystemExit):
    parity.main(["--text", __file__])
  assert "--text needs --gguf" in capsys.readouterr().err


def test_startup_tells_a_cold_workdir_from_one_with_its_programs(monkeypatch, capsys):
  found = []

  def measure(*arguments):
    found.append(arguments)
    _, has_workdir, workdir = arguments[-1].partition("--first_step=")
    if not has_workdir:
      return {"seconds": 0.1, "cpu_seconds": 0.01}
    stage, programs = pathlib.Path(workdir, "pretrain"), pathlib.Path(workdir, "compiled")
    assert not stage.exists()
    stage.mkdir()
    is_cold = not programs.exists()
    programs.mkdir(exist_ok=True)
    return {"seconds": 9.0 if is_cold else len(found) / 7, "cpu_seconds": 1.0}

  monkeypatch.setattr(startup, "measure", measure)
  startup.main(["--repeats=3"])
  (line,) = capsys.readouterr().out.splitlines()
  result = json.loads(line)
  assert result["first step, cold"] == {"seconds": 9.0, "cpu_seconds": 1.0}
  assert result["first step, cached"]["seconds"] == 2.0  # the median of 1, 2 and 3
  assert result["plan --help"]["cpu_seconds"] == 0.01


def test_a_process_is_measured():
  found = startup.measure("-c", "sum(range(1_000_000))")
  assert 0 < found["cpu_seconds"] and 0 < found["seconds"]


@pytest.mark.parametrize("load", ppo_iteration.WORKLOADS.values(), ids=ppo_iteration.WORKLOADS)
def test_workloads_of_an_iteration_are_valid(load):
  config = ppo_iteration.make_config(load, {"ppo.packed_rows": 1, "rollout.slots": 8})
  assert (config.ppo.packed_rows, config.rollout.slots, config.ppo.gamma) == (1, 8, 0.0)
  assert config.ppo.batch_size == load.batch and config.model.d_model == load.model["d_model"]


def test_flops_that_an_iteration_needs_by_hand():
  flops = ppo_iteration.bound_flops(ppo_iteration.WORKLOADS["W1"], 16 * 32, 16 * 32)
  body = 1024 * 2 * 12 * 12 * 768**2  # tokens, a product and a sum, layers of 12 d^2 weights
  head = 512 * 2 * 768 * 50257  # the answers' logits
  assert flops == {
    "rollout": body + head,
    "scoring": 3 * body + head,
    "update": 3 * (2 * body + head),
  }


def test_bytes_that_an_iterations_updates_move_by_hand():
  layer = 12 * 256**2 + 13 * 256  # weights; biases and norms
  body = 4 * layer + 2 * 256 + (512 + 2048) * 256  # with last norm, tokens and positions
  parameters = 2 * body + 257  # two networks, one of which has a scalar head
  # 4 epochs of 4 minibatches; a float32 weight and its two moments are read and written.
  assert ppo_iteration.update_bytes(ppo_iteration.WORKLOADS["W2"], {}) == 16 * 6 * 4 * parameters


def test_flops_with_shared_keys_and_gates_by_hand():
  flops = ppo_iteration.bound_flops(ppo_iteration.WORKLOADS["135M"], 16 * 32, 16 * 32)
  adapted = ppo_iteration.bound_flops(
    ppo_iteration.WORKLOADS["135M"], 16 * 32, 16 * 32, is_adapted=True
  )
  assert adapted == flops | {"update": flops["update"] * 2 / 3}
  # 576 to 9 + 2 x 3 heads of 64 and 9 heads back; gate, up and down of 1536.
  layer = 576 * 15 * 64 + 9 * 64 * 576 + 3 * 576 * 1536
  assert flops["rollout"] == 1024 * 2 * 30 * layer + 512 * 2 * 576 * 49152


def test_a_baseline_is_without_the_value_networks_work_by_hand():
  load = ppo_iteration.WORKLOADS["W2"]
  changes = ppo_iteration.changes_of("ppo.advantage=rloo,ppo.packed_rows=1")
  assert changes == {"ppo.advantage": "rloo", "ppo.packed_rows": 1}
  config = ppo_iteration.make_config(load, changes)
  assert (config.ppo.advantage, config.ppo.samples_per_prompt) == ("rloo", 4)
  pairs = ppo_iteration.make_config(load, changes | {"ppo.samples_per_prompt": 2})
  assert pairs.ppo.samples_per_prompt == 2
  counts = ppo_iteration.parameter_counts(load, config)
  assert set(counts) == {"policy"}
  assert ppo_iteration.update_bytes(load, changes) == 16 * 6 * 4 * counts["policy"]
  flops = ppo_iteration.bound_flops(load, 64 * 16, 64 * 32, has_value_network=False)
  body = 64 * 48 * 2 * 4 * 12 * 256**2  # tokens, a product and a sum, layers of 12 d^2 weights
  head = 64 * 32 * 2 * 256 * 512
  assert flops == {
    "rollout": body + head,
    "scoring": 2 * body + head,
    "update": 3 * 4 * (body + head),  # one network, in 4 epochs
  }


def test_a_peer_has_no_network_of_smollm2():
  with pytest.raises(UserError, match="--peer=trl has no network of this workload's shape"):
    ppo_iteration.peer_command("trl", ppo_iteration.WORKLOADS["135M"])


def test_a_peer_without_its_environment_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(ppo_iteration, "PEERS", tmp_path)
  with pytest.raises(UserError, match="--peer=trl needs .*; run benchmarks/peers/setup.sh trl$"):
    ppo_iteration.peer_command("trl", ppo_iteration.WORKLOADS["W2"])


def test_a_peer_is_told_the_workload(monkeypatch, tmp_path):
  python = tmp_path / ".venv-tunix/bin/python"
  python.parent.mkdir(parents=True)
  python.touch()
  monkeypatch.setattr(ppo_iteration, "PEERS", tmp_path)
  *start, shape = ppo_iteration.peer_command("tunix", ppo_iteration.WORKLOADS["W3"])
  assert start == [str(python), str(tmp_path / "tunix_ppo.py")]
  shape = json.loads(shape)
  assert (shape["response"], shape["ends"], shape["model"]["d_model"]) == (512, True, 256)


@pytest.mark.parametrize(
  ("workload", "said", "error"),
  [
    ("W2", {"updates": 16, "response_tokens": 2048}, None),
    ("W2", {"response_tokens": 2048}, None),  # ours
    ("W2", {"updates": 4, "response_tokens": 2048}, "trl does other work: updates 4, where 16 are"),
    ("W2", {"updates": 16, "response_tokens": 2047}, "response_tokens 2047, where 2048 are"),
    ("W3", {"updates": 4, "response_tokens": 4096}, None),  # as long as they happen to be
  ],
)
def test_other_work_is_not_compared(workload, said, error):
  refused = pytest.raises(UserError, match=error) if error else contextlib.nullcontext()
  with refused:
    ppo_iteration.check_same_work(ppo_iteration.WORKLOADS[workload], {"trl": said})


def test_ratios_are_of_medians_ours_over_the_peers():
  spread = lambda wall, cpu: {"wall_s": {"median": wall}, "cpu_s": {"median": cpu}}
  found = {"a=0": spread(3.0, 1.0), "a=1": spread(1.0, 5.0), "trl": spread(4.0, 2.0)}
  found["ppo.advantage=grpo"] = spread(1.0, 1.0)  # other work than the peer's
  assert ppo_iteration.ratios(found, "trl") == {
    "a=0": {"wall_s": 0.75, "cpu_s": 0.5},
    "a=1": {"wall_s": 0.25, "cpu_s": 2.5},
  }


def test_the_rollout_benchmark_is_of_workload_w3():
  w3 = ppo_iteration.WORKLOADS["W3"]
  assert (slots.ROWS, slots.PROMPT, slots.RESPONSE, slots.VOCAB) == (
    *(w3.batch, w3.prompt, w3.response, w3.vocab_size),
  )
  assert slots.make_model().network.num_layers == w3.model["num_layers"]


def test_random_rankings_are_of_the_length_that_the_benchmark_says():
  config = from_config_dict(models.get("rm", None))
  rankings = rm_rows.random_rankings(config, 90)
  lengths = [len(item.prompt) + len(x) for item in rankings for x in item.responses]
  assert (min(lengths), max(lengths)) == (5 + 4, 12 + 20)
  assert abs(sum(lengths) / len(lengths) - 20.5) < 0.3
  assert {len(item.ranks) for item in rankings} == {4, 5, 6}


def test_both_steps_of_the_split_benchmark_are_given_the_same_reward():
  one, two = (reward_split.make_config(x) for x in (reward_split.IN_PROGRAM, reward_split.ON_HOST))
  rule, function = (rewards.parse(c.ppo.rewards, "rewards")[1] for c in (one, two))
  assert (rule.on_host, function.on_host, rule.weight) == (False, True, function.weight)
  lengths = [0, 3, 16, 17, 40]
  found = reward_split.too_long([], [], answer_ids=[[7] * length for length in lengths])
  low, high = rule.lengths
  assert found == [-max(low - n, 0) - max(n - high, 0) for n in lengths]
