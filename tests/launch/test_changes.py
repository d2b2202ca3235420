"""What to change in a plan: which settings are tried, and what is made of the answers, with a made-up compiler."""

import dataclasses

import jax
import pytest

from instructjax.core.blocks import validate
from instructjax.core.config import MeshConfig, from_config_dict
from launch import changes, lengths, programs, topology, whole_run
from tests.launch.small import mesh_of, settings

CHIP = topology.CHIPS["v5e"]
GIB = topology.GIB


def small():
  split = dict(data=1, fsdp=2, tensor=2)
  return from_config_dict(settings(ppo=dict(batch_size=64), mesh=split))


def change(seconds: float, gib: float, fits: bool = True, **values):
  values = values or {"execution.remat": "full"}
  return changes.Change(values, seconds, gib * GIB, is_compiled=False, fits=fits)


def test_what_is_tried():
  config = small()
  found = changes.candidates(config, "ppo_ptx", mesh_of(config), lengths.BOUND)
  assert {"execution.remat": "full"} in found and {"execution.remat": "products"} not in found
  assert {"mesh": MeshConfig(1, 1, 4, 1)} in found and {"mesh": MeshConfig(1, 1, 1, 4)} in found
  assert {"rollout.slots": 8} in found and {"ppo.ptx_microbatches": 1} in found
  assert not any("ppo.packed_rows" in one for one in found)  # nothing gained by it
  by_length = changes.candidates(config, "ppo_ptx", mesh_of(config), lengths.Means(20.0, 20.0))
  assert {"ppo.packed_rows": 2, "ppo.microbatches": 1, "ppo.score_microbatches": 1} in by_length
  # Whatever is tried is a config, and has a program.
  for values in by_length:
    other = changes.changed(config, values)
    validate(other, "config")
    programs.make(other, mesh_of(other), "ppo_ptx")


def test_short_answers_make_slots_worth_it_and_full_remat_never_is():
  config, means = small(), lengths.Means(16.0, 16.0)
  devices = jax.devices()[:4]
  expected, sizes = whole_run.sketched(config, "ppo_ptx", mesh_of(config), CHIP, means)
  now = expected.seconds, 3.0 * GIB
  found = changes.sketch_all(config, "ppo_ptx", devices, CHIP, means, now)
  by_name = {"+".join(one.values): one for one in found}
  assert by_name["execution.remat"].seconds != expected.seconds
  slower = [one for one in found if one.values == {"execution.remat": "full"}]
  assert slower[0].seconds > expected.seconds and slower[0].bytes <= 3.0 * GIB
  fewer = changes.changed(config, {"rollout.slots": 32})
  half, _ = whole_run.sketched(fewer, "ppo_ptx", mesh_of(config), CHIP, means)
  assert half.parts[0].seconds < expected.parts[0].seconds
  good = changes.promising(found, expected.seconds, fits=True)
  assert all(one.seconds < 0.97 * expected.seconds for one in good)
  assert [one.seconds for one in good] == sorted(one.seconds for one in good)


def test_what_fits_comes_first_where_the_plan_does_not():
  found = [
    change(5.0, 20.0, fits=False),
    change(9.0, 3.0),
    change(7.0, 4.0),
    change(1.0, 17.0, False),
  ]
  order = changes.promising(found, 6.0, fits=False)
  assert [one.seconds for one in order] == [7.0, 9.0, 1.0, 5.0]
  # Adapters are another recipe: only where nothing else fits.
  adapters = change(2.0, 1.0, **{"adapter.rank": 16})
  assert adapters not in changes.promising([*found, adapters], 6.0, fits=False)
  assert adapters not in changes.promising([*found, adapters], 6.0, fits=True)
  assert changes.promising([found[0], adapters], 6.0, fits=False)[0] == adapters
  (_, line) = changes.text([adapters], 6.0, 20 * GIB, fits=False)
  assert line == "  adapter.rank=16: saves 4 s of 6, 1.00 GiB (-19.00), sketched, another recipe"


def test_the_compiler_is_asked_until_one_fits():
  found = [change(1.0, 10.0), change(2.0, 11.0), change(3.0, 12.0)]
  refused = {"fits": False, "out_of_memory": {"needed": 16.5}}
  held = {"fits": True, "expected": {"seconds": 2.5}, "memory": {"allocated": 9 * GIB}}
  answers = iter([refused, held])
  asked = changes.compile_best(found, 3, False, lambda flags: next(answers))
  assert [one.is_compiled for one in asked] == [True, True, False]
  assert [one.fits for one in asked] == [False, True, True]
  assert (asked[1].seconds, asked[1].bytes, asked[0].bytes) == (2.5, 9 * GIB, 16.5 * GIB)
  # A crash is no answer.
  (same,) = changes.compile_best(found[:1], 1, True, lambda flags: {"failure": "signal 9"})
  assert same == found[0]
  assert changes.compile_best(found, 0, True, None) == found


def test_in_words():
  config = small()
  one = dataclasses.replace(change(4.0, 2.0, **{"rollout.slots": 64}), is_compiled=True)
  two = change(6.0, 1.0, mesh=config.mesh)
  lines = changes.text([one, two], 5.0, 3.0 * GIB, fits=True)
  assert lines[1] == "  rollout.slots=64: saves 1 s of 5, 2.00 GiB (-1.00), compiled"
  assert lines[2] == "  mesh=fsdp:2,tensor:2: costs 1 s, 1.00 GiB (-2.00), sketched"
  assert two.flags == ["--mesh=fsdp:2,tensor:2"] and one.flags == ["--config.rollout.slots=64"]
  assert "nothing that was tried saves time" in changes.text([], 5.0, 1.0, True)[0]
  assert "fits; nearest" in changes.text([change(1.0, 20.0, False)], 5.0, 30 * GIB, False)[0]


@pytest.mark.parametrize(("count", "most", "near"), [(2, 8, [1, 4, 8]), (1, 6, [2]), (4, 4, [2])])
def test_near_counts(count, most, near):
  assert changes._near(count, most) == near
