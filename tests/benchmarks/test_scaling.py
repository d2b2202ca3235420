"""The scaling benchmark: exponents, and what is taken for compilation."""

import jax
import pytest

from benchmarks import scaling
from instructjax.core.config import MeshConfig
from instructjax.parallel import sharding


@pytest.fixture(autouse=True)
def mesh_of_its_own():
  """The benchmarks set one for their whole process."""
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, -1, 1, 1))):
    yield


@pytest.mark.parametrize(("values", "power"), [((3, 6, 12), 1), ((5, 5, 5), 0), ((2, 8, 32), 2)])
def test_exponent_by_hand(values, power):
  assert scaling.exponent(list(values)) == pytest.approx(power, abs=1e-12)


def test_the_first_run_but_for_a_median_one_is_compilation(monkeypatch):
  seconds = {"a": iter([10.0, 2.0, 1.0, 9.0]), "b": iter([20.0, 4.0, 5.0, 3.0])}
  monkeypatch.setattr(scaling, "cpu_seconds", lambda once: next(seconds[once]))
  assert scaling.measure(["a", "b"], repeats=3) == [
    {"cpu_s": 2.0, "compile_cpu_s": 8.0},
    {"cpu_s": 4.0, "compile_cpu_s": 16.0},
  ]


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_decode_steps_of_a_small_size(layers):
  once = scaling.decode(scaling.Size(batch=2, length=20, layers=2), layers)
  once()
  once()  # its state was donated
