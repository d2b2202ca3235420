"""The lines of steps: which metrics and samples they have, and when they are shown."""

import jax.numpy as jnp

from tests.train import toy


def test_samples_add_metrics_and_are_shown_at_log_steps(tmp_path, capsys):
  def step(state, x):
    state, metrics = toy.step(state, x)
    return state, metrics, jnp.float32(x)

  def on_samples(samples, number):
    extra = {"length": float(samples), "ratio": float("nan")}
    return extra, [{"prompt": f"p{number}", "score": float(samples)}]

  toy.train(
    tmp_path, step_fn=step, num_steps=5, on_samples=on_samples, progress=True, show=("loss",)
  )
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == [
    "toy 4/5",
    "toy step 4",
    "toy 5/5",
    "toy step 5",
  ]
  assert "prompt: p4" in lines[1] and "loss" in lines[0] and "kl" not in lines[0]
  records = toy.records(tmp_path)
  assert all("length" in record and "ratio" not in record for record in records)
