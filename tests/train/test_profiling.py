"""Traced steps: which they are, what phase an operation is of, how time is shared out, what the tables say."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core import terminal
from instructjax.core.config import ProfileConfig
from instructjax.train import profiling
from instructjax.train.profiling import StepProfile, phase_of, traced_steps


@pytest.mark.parametrize(
  ("steps", "start", "num_steps", "traced"),
  [
    ("", 0, 10, []),
    ("3:5", 0, 10, [3, 4]),
    ("2:100", 0, 4, [2, 3, 4]),
    ("5:9", 0, 4, []),
    ("3:6", 3, 10, [5]),  # the first step after a resume, 4, compiles
    ("3:5", 7, 10, []),
  ],
)
def test_which_steps_are_traced(steps, start, num_steps, traced):
  assert [*traced_steps(ProfileConfig(steps), start, num_steps)] == traced


@pytest.mark.parametrize(
  ("op_name", "phase"),
  [
    ("jit(step)/rollout/while/body/dot_general", "rollout"),
    ("jit(step)/while/body/update/policy/transpose(jvp())/mul", "update/policy"),
    ("jit(step)/update/ptx", "update/ptx"),
    ("jit(step)/scores/mul", "other"),
    ("", "other"),
  ],
)
def test_the_phase_is_a_scope_of_the_name(op_name, phase):
  assert phase_of(op_name) == phase


def test_shared_time_is_split():
  # a: 0-4 alone and 4-6 with b, twice over at 1-2; b: 4-6 with a, 6-8 alone; c: 10-11.
  spans = [(0, 6, "a"), (1, 2, "a"), (4, 8, "b"), (10, 11, "c")]
  assert profiling.shared_time(spans) == {"a": 5.0, "b": 3.0, "c": 1.0}


def test_what_is_left_of_a_step():
  assert profiling.with_rest({"rollout": 0.75}, 1.0) == {"rollout": 0.75, "idle": 0.25}
  # Nothing was seen, which is not to say that nothing ran.
  assert profiling.with_rest({}, 1.0) == {"unknown": 1.0}


TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (f32[2])) -> (f32[2]) {
  %p = (f32[2]) parameter(0)
  ROOT %fusion.1 = f32[2]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/rollout/while/body/while (x)"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %while.2 = (f32[2]) while(%x), condition=%cond, body=%body, metadata={op_name="jit(step)/rollout/while"}
  %copy.3 = f32[2]{0} copy(%while.2)
  ROOT %fusion.4 = f32[2]{0} fusion(%copy.3), metadata={op_name="jit(step)/update/value/add" stack_frame_id=4}
}
"""


def test_phases_of_a_programs_operations():
  found = profiling.operation_phases(TEXT)
  names = ("fusion.1", "while.2", "copy.3", "fusion.4")
  assert [found[name] for name in names] == ["rollout", None, "other", "update/value"]


def event(name, start, duration, **stats):
  return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def trace(planes):
  """What ProfileData gives: planes of lines of events."""
  lines = lambda named: [types.SimpleNamespace(name=n, events=e) for n, e in named.items()]
  named = [types.SimpleNamespace(name=n, lines=lines(ls)) for n, ls in planes.items()]
  return types.SimpleNamespace(planes=named)


def test_seconds_by_phase_are_means_over_devices():
  """As a TPU tells it: a plane a device, operations named by their text, other lines and planes beside them."""
  first = {
    "XLA Modules": [event("jit_step(17)", 0, 10e9)],
    "XLA Ops": [
      event("%while.2 = (f32[2]) while(%x)", 0, 6e9),
      event("%fusion.1 = f32[2] fusion(%p)", 0, 2e9),
      event("%fusion.1 = f32[2] fusion(%p)", 3e9, 2e9),
      event("%fusion.4 = f32[2] fusion(%copy.3)", 6e9, 1e9),
    ],
  }
  second = {"XLA Ops": [event("%fusion.1 = f32[2] fusion(%p)", 0, 6e9)]}
  host = {"launch": [event("fusion.4", 0, 9e9, hlo_op="fusion.4")]}
  planes = {"/host:CPU": host, "/device:TPU:0": first, "/device:TPU:1": second}
  found = profiling.phase_seconds(trace(planes), TEXT)
  assert found == pytest.approx({"rollout": 5.0, "update/value": 0.5})


def test_on_a_cpu_operations_are_told_apart_from_the_hosts_work_and_from_other_programs():
  step = dict(hlo_module="jit_step", device_ordinal=0)
  threads = {
    "python": [event("fusion.1", 0, 9e9)],
    "pool/1": [event("fusion.1", 0, 2e9, hlo_op="fusion.1", **step)],
    "pool/2": [
      event("copy.3", 1e9, 1e9, hlo_op="copy.3", **step),
      event("fusion.4", 3e9, 1e9, hlo_op="fusion.4", hlo_module="jit_evaluate", device_ordinal=0),
    ],
  }
  found = profiling.phase_seconds(trace({"/host:CPU": threads}), TEXT)
  assert found == pytest.approx({"rollout": 1.5, "other": 0.5})


# --- a trace --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
  def step(state, scale, batch):
    with jax.named_scope("gradient"):
      grad = jax.grad(lambda w: jnp.sum(jnp.tanh(batch @ w) ** 2))(state)
    with jax.named_scope("optimizer"):
      state = state - scale * grad
    return state, {"tokens": jnp.float32(batch.shape[0]), "grad_norm": jnp.linalg.norm(grad)}

  return jax.jit(step, donate_argnums=0)


def arguments():
  return jnp.full((64, 64), 0.01), jnp.float32(0.1), jnp.ones((32, 64))


def take(profile, num_steps):
  state, *rest = arguments()
  with profile:
    for number in range(1, num_steps + 1):
      state, _ = profile(number, state, *rest)
  return np.asarray(state)


def test_a_traced_step_is_summed_up_and_the_same(tmp_path, step, capsys):
  plain = take(StepProfile(tmp_path / "none", range(0), step, None), 4)
  assert not (tmp_path / "none").exists()
  compiled = []
  count = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    profile = StepProfile(tmp_path, range(2, 4), step, lambda metrics: 10.0 * metrics["tokens"])
    traced = take(profile, 4)
    assert not compiled  # the text that names the phases is of the program that was run
    jax.jit(lambda x: x * 3)(1.0)
    assert compiled  # the listener does hear of one
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  np.testing.assert_array_equal(traced, plain)
  assert len([*tmp_path.glob("plugins/profile/process_0/*.xplane.pb")]) == 1
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["steps"] == [2, 3] and summary["device"].endswith("x cpu")
  phases = summary["phases"]
  assert {"gradient", "optimizer", "idle"} <= phases.keys() <= {*profiling.PHASES, "other", "idle"}
  assert min(phases.values()) >= 0 < phases["gradient"]
  assert sum(phases.values()) == pytest.approx(summary["seconds"])
  assert summary["tokens_per_second"] == pytest.approx(32 / summary["seconds"])
  assert summary["model_flops_per_second"] == pytest.approx(320 / summary["seconds"])
  assert "mfu" not in summary  # nobody publishes this CPU's peak


def test_a_stage_stopped_in_between_leaves_no_trace_running(tmp_path, step):
  profile = StepProfile(tmp_path, range(2, 9), step, None)
  take(profile, 3)
  assert [*tmp_path.rglob("*.xplane.pb")] and not (tmp_path / "summary.json").exists()
  jax.profiler.start_trace(tmp_path / "next")  # which refuses where another is running
  jax.profiler.stop_trace()


# --- tables ---------------------------------------------------------------------------------------


def cells(text: str, first: str) -> list[str]:
  """The row of a table that starts with `first`."""
  rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
  return next(row for row in rows if row[0] == first)


def test_what_a_runs_stages_took(tmp_path, capsys):
  (tmp_path / "ppo").mkdir()
  rows = [
    {"step": 0, "validation/loss": 4.0},
    {"step": 1, "seconds": 60.0, "tokens": 900.0},  # compiles
    {"step": 2, "seconds": 0.5, "tokens": 900.0},
    {"step": 3, "seconds": 0.4, "tokens": 1000.0},
  ]
  (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  stages = [("ppo", 61.23, tmp_path / "ppo"), ("evaluate", 7.0, tmp_path / "evaluate")]
  terminal.show(profiling.stage_table(stages))
  text = capsys.readouterr().out
  assert cells(text, "ppo") == ["ppo", "61.2", "3", "0.5", "1,800"]
  assert cells(text, "evaluate") == ["evaluate", "7.0", "", "", ""]


def test_the_table_of_traced_steps(tmp_path, capsys):
  assert not profiling.show_profile("ppo", tmp_path)
  summary = dict(
    steps=[3, 4], device="4 x TPU v5 lite", seconds=2.0, phases={"rollout": 1.5, "idle": 0.5},
    tokens_per_second=1234.5, model_flops_per_second=197e12, mfu=0.25,
  )  # fmt: skip
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  assert profiling.show_profile("ppo", tmp_path)
  text = capsys.readouterr().out
  assert "ppo: mean of steps 3 to 4 on 4 x TPU v5 lite; trace in " in text
  assert cells(text, "rollout") == ["rollout", "1.5", "75.0%"]
  assert cells(text, "step") == ["step", "2", "100%"]
  assert "1,234 tokens/s, 197,000.0 model GFLOP/s, 25.0% of the devices' bfloat16 peak" in text
