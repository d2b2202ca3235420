"""The planner: what it reads in compiled text, against figures worked out by hand, and one small compile for v5e:2x2.

The compile needs libtpu (the extra `plan`) and is skipped without it.
"""

import importlib.util
import math
import os
import pathlib
import types
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from instructjax.core.config import MeshConfig, from_config_dict
from instructjax.core.errors import UserError
from instructjax.parallel import sharding
from launch import (
  costs,
  estimate,
  expect,
  hlo,
  lengths,
  plan,
  planning,
  programs,
  topology,
  whole_run,
)
from tests.launch.small import mesh_of, settings

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# Cut down from steps compiled for v5e:2x2, the numbers changed so that each can be told apart.
# A loop from 2 to 20 by 3 around one from 0 to 5 by 2, with the attributes that the compiler prints.
LOOPS = (GOLDEN / "plan_loops.hlo").read_text(encoding="utf-8")

# An all-gather that is printed three times, a reduce-scatter as the TPU spells it, twice with one channel, and a
# weight of which a fusion reads one layer and another writes one row.
COLLECTIVES = (GOLDEN / "plan_collectives.hlo").read_text(encoding="utf-8")

# An attention kernel of 2 rows, 3 heads and 512 columns, with the lines that its attributes have of their own.
KERNEL = (GOLDEN / "plan_kernel.hlo").read_text(encoding="utf-8")


def total_cost(found: costs.Summary) -> costs.Cost:
  """The cost of all phases together."""
  total = costs.Cost()
  for cost in found.phases.values():
    total += cost
  return total


def test_trip_counts_take_start_and_step():
  module = hlo.parse(LOOPS)
  loops = {
    item.name: hlo.trip_count(module, computation, item)
    for computation in module.computations.values()
    for item in computation.instructions.values()
    if item.opcode == "while"
  }
  # 2, 5, .. 17 is below 20, six values; 0, 2, 4 is below 5.
  assert loops == {"loop": 6, "loop.3": 3}


def test_costs_are_multiplied_by_nested_loops():
  found = costs.summarise(LOOPS, num_devices=8)
  # 8 x 16 outputs of 16 products each, run 6 * 3 times.
  assert found.phases["rollout"].flops == 18 * 2 * 8 * 16 * 16
  # 256 bytes in groups of 4 (axis_1), six times: a ring sends each quarter 2 * 3 times.
  assert found.by_kind == {"all-reduce": (6, 6 * 2 * 256 * 3 / 4)}
  assert found.loops["loop"].trips == 6
  assert found.loops["loop"].cost.wire_bytes == found.phases["rollout"].wire_bytes
  assert found.unknown_trips == []


def test_turns_that_the_lengths_decide():
  text = LOOPS.replace("direction=LT", "direction=NE")
  turns = {"jit(step)/rollout/while": 2.5, "jit(step)/rollout/while/body/while": 4.0}
  found = costs.summarise(text, num_devices=8, turns=turns.get)
  assert found.unknown_trips == []
  assert found.phases["rollout"].flops == 2.5 * 4 * 2 * 8 * 16 * 16
  # Decode steps inside another loop are counted by themselves.
  text = text.replace("rollout/while/body/while", "rollout/slots/while/body/decode/while")
  name = "jit(step)/rollout/slots/while/body/decode/while"
  found = costs.summarise(text, num_devices=8, turns={**turns, name: 4.0}.get)
  decoding = whole_run.total_decoding(found)
  assert decoding.trips == 2.5 * 4
  assert decoding.cost.flops == found.phases["rollout"].flops == 10 * 2 * 8 * 16 * 16
  assert found.loops["loop"].trips == 2.5 and found.loops["loop"].cost.flops == 0
  assert whole_run.total_decoding(costs.summarise(LOOPS, num_devices=8)) is None


def test_a_loop_of_unknown_length_is_named():
  text = LOOPS.replace("direction=LT", "direction=NE")
  found = costs.summarise(text, num_devices=8)
  assert found.unknown_trips == ["jit(step)/rollout/while", "jit(step)/rollout/while/body/while"]
  assert found.phases["rollout"].flops == 2 * 8 * 16 * 16


def test_collectives_by_kind():
  found = costs.summarise(COLLECTIVES, num_devices=8)
  assert found.by_kind == {
    "all-gather": (1, 4 * 8 * 2 * 3),  # a shard of 64 bytes to three others, once
    "reduce-scatter": (2, 2 * 32 * 8 * 4 / 2),  # half of 1024 bytes stays, twice
    "collective-permute": (1, 16 * 8 * 4),
  }


def test_bytes_of_a_layer_and_a_row_not_of_the_stack():
  found = costs.summarise(COLLECTIVES, num_devices=8)
  layer, shard, gathered, grad, scattered = 256, 64, 256, 1024, 512
  # The all-gather's shard read and its result written, by who uses it; nothing for its repetitions.
  assert found.phases["scoring"].hbm_bytes == layer + shard + gathered
  update = 2 * (grad + scattered) + 2 * scattered + layer
  assert found.phases["update"].hbm_bytes == update


def test_bytes_through_a_view():
  text = """\
%view (a.1: f32[64]) -> f32[8,8] {
  %a.1 = f32[64]{0} parameter(0)
  ROOT %b.1 = f32[8,8]{1,0} bitcast(%a.1)
}

%negated (a.2: f32[64]) -> f32[8,8] {
  %a.2 = f32[64]{0} parameter(0)
  %b.2 = f32[8,8]{1,0} fusion(%a.2), kind=kLoop, calls=%view
  ROOT %c.2 = f32[8,8]{1,0} negate(%b.2)
}

ENTRY %main (a: f32[64]) -> f32[8,8] {
  %a = f32[64]{0} parameter(0)
  ROOT %b = f32[8,8]{1,0:S(1)} fusion(%a), kind=kLoop, calls=%negated
}
"""
  assert total_cost(costs.summarise(text, 1)).hbm_bytes == 256


@pytest.mark.parametrize(
  "left, kernel, output, window, products",
  [
    ("8,16", "16,4", "8,4", "dim_labels=bf_io->bf", 1),
    # A batch of 3 as the compiler spells it: the input spread out, so that each kernel position meets one.
    (
      "3,8,16",
      "3,16,4",
      "3,8,4",
      "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
      3,
    ),
    # Another spelling of it, beside a dimension of size 1.
    (
      "2,1,8,16",
      "2,1,16,4",
      "2,1,8,4",
      "window={size=2x1 stride=1x1 lhs_dilate=2x1}, dim_labels=01bf_01io->01bf",
      2,
    ),
    # Three kernels for one input: the input's padding multiplies nothing.
    (
      "1,8,16",
      "3,16,4",
      "3,8,4",
      "window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
      3,
    ),
  ],
)
def test_convolution_flops(left, kernel, output, window, products):
  text = f"""\
ENTRY %main (a: f32[]) -> f32[] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %o = f32[{output}] convolution(%a, %b), {window}
}}
"""
  assert total_cost(costs.summarise(text, 1)).flops == products * 2 * 8 * 16 * 4


@pytest.mark.parametrize(
  "scope, part, products, blocks",
  [
    # Rows 0, 128, 256, 384 of 128 queries: what they see lies in 1, 1, 2 and 2 blocks of 256 keys.
    ("attention_causal", "fwd", 2, 6),
    ("attention_causal", "dkv", 4, 6),
    # The 129 newest columns: of rows 384 on the oldest is 256, with which the second block begins.
    ("attention_band_129", "dq", 3, 5),
  ],
)
def test_costs_of_an_attention_kernel(scope, part, products, blocks):
  text = KERNEL.replace("SCOPE", scope).replace("PART", part)
  found = total_cost(costs.summarise(text, 1))
  assert found.flops == found.kernel_flops == 2 * products * 2 * 3 * blocks * 128 * 256 * 64
  # Two masks of 8 bytes, queries, keys and values, and what comes out; the rest stays on the chip.
  assert found.hbm_bytes == 2 * 8 + 4 * 2 * 3 * 512 * 64 * 2
  assert total_cost(costs.summarise(text.replace("splash", "other"), 1)) == costs.Cost()


def test_host_transfers():
  line = (
    "  %s = (f32[8]{0}, u32[]) send(%x), channel_id=1, is_host_transfer=true,"
    ' frontend_attributes={_xla_host_transfer_handler_name="HANDLER"}\n'
  )

  def found(extra: str):
    head = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    return costs.summarise(head + extra + "  ROOT %y = f32[8]{0} copy(%x)\n}\n", 1).host_transfers

  assert found("") == []
  assert found(line.replace("HANDLER", "pjrt_rendezvous")) == ["s"]
  assert found(line.replace("HANDLER", "xla_megascale_runtime")) == []
  assert found("  %h = f32[8]{0:S(5)} copy(%x)\n") == ["h"]


# Two slices: what crosses DCN is a send to the host's runtime. In a loop of four trips, once outside, and once from one
# slice to another.
BETWEEN_SLICES = (GOLDEN / "plan_slices.hlo").read_text(encoding="utf-8")


def test_what_is_sent_between_slices_is_no_host_transfer():
  for num_slices in (2, 4):
    found = costs.summarise(BETWEEN_SLICES, num_devices=8, num_slices=num_slices)
    share = (num_slices - 1) / num_slices
    assert found.host_transfers == []
    assert found.by_kind == {
      "DCN all-reduce": (4, 4 * 2 * 1024 * share),  # a ring sends each part twice
      "DCN all-gather": (1, 256 * (num_slices - 1)),
      "DCN one-to-one": (1, 64),
    }
    assert total_cost(found).wire_bytes == 0
    assert total_cost(found).dcn_bytes == sum(sent for _, sent in found.by_kind.values())
    # HBM: each send reads its operand, each receive writes it; the loop runs four times.
    assert total_cost(found).hbm_bytes == 2 * (4 * 1024) + (256 + 256 * 4) + 2 * 64
  assert ("DCN all-reduce", "all-reduce.10_0") in found.collectives


NEAR_MISS = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in"
  " memory space hbm. Used 16.51G of 15.75G hbm. Exceeded hbm capacity by 781.31M."
)
HOPELESS = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
  " temporaries (200.00G) exceeds available HBM (15.75G). HLO module: jit_step."
)


@pytest.mark.parametrize(
  "message, needed, words",
  [
    (NEAR_MISS, 16.51, "it needs 16.51 GiB of HBM a device, and the compiler has 15.75 GiB: 0.76"),
    (HOPELESS, 200.0, "temporaries alone need at least 200.00 GiB"),
  ],
)
def test_out_of_memory_in_words(message, needed, words):
  found = estimate.out_of_memory(message)
  assert (found["needed"], found["available"]) == (needed, 15.75)
  report = {
    "stage": "sft",
    "preset": "p",
    "topology": "v5e:2x2",
    "chip": "TPU v5e",
    "devices": 4,
    "mesh": {"fsdp": 4},
    "a_run_refuses": "",
    "out_of_memory": found,
    "memory": {"arguments": {"policy master": 2**30, "optimiser": 2**31}, "inside": {}},
  }
  text = estimate.refusal(report)
  assert words in text and "the largest of them optimiser with 2.00 GiB" in text
  assert estimate.out_of_memory("INVALID_ARGUMENT: something else") is None


def test_timing_takes_the_largest_term_of_each_phase():
  chip = topology.Chip(
    "x", 2**30, flops=100.0, hbm_rate=10.0, link_rate=1.0, dcn_rate=0.5, clock=2.0
  )
  phases = {
    # 1, 5, 2 s; 6 s, of them .5 of 25 FLOPs in kernels at half the rate.
    "rollout": costs.Cost(100, kernel_flops=25, hbm_bytes=50, wire_bytes=2, cycles=11),
    "scoring": costs.Cost(flops=300, hbm_bytes=10, wire_bytes=4, cycles=2),  # 3, 1, 4 s; 1 s
    "update": costs.Cost(flops=700, hbm_bytes=0, wire_bytes=0, cycles=16),  # 7, 0, 0 s; 8 s
  }
  found = estimate.timing(costs.Summary(phases, {}, {}, [], []), chip, 4, 32, 8.0)
  assert [found["phases"][name]["binds"] for name in phases] == ["HBM", "links", "compute"]
  seconds = {way: total["seconds"] for way, total in found["estimates"].items()}
  assert seconds == {"roofline": 5 + 4 + 7, "overlapped": 6 + 4 + 8, "serial": 8 + 5 + 8}
  assert found["estimates"]["roofline"]["tokens"] == 2.0
  assert found["estimates"]["roofline"]["mfu"] == 0.5
  phases["update"].dcn_bytes = 5  # 10 s: more than computing
  found = estimate.timing(costs.Summary(phases, {}, {}, [], []), chip, 4, 32, 8.0)
  assert found["phases"]["update"]["binds"] == "DCN"
  seconds = {way: total["seconds"] for way, total in found["estimates"].items()}
  assert seconds == {"roofline": 5 + 4 + 10, "overlapped": 6 + 4 + 10, "serial": 8 + 5 + 18}


def test_a_report_in_words():
  chip = topology.CHIPS["v5e"]
  found = costs.summarise(LOOPS, num_devices=8)
  expected = expect.iteration([expect.Part("update", 10.0, 5.0, 20.0, "of nothing")])
  report = {
    "stage": "sft",
    "preset": "p",
    "topology": "v5e:2x4",
    "chip": chip.name,
    "devices": 8,
    "mesh": {"fsdp": 8},
    "memory": estimate.memory(
      {"policy master": 2**30},
      {"KV cache": 2**29},
      allocated=3 * 2**30,
      peak=2 * 2**30,
      program=2**20,
      hbm=chip.hbm_bytes,
    ),
    "timing": estimate.timing(found, chip, 8, 64, None),
    "token_kind": "tokens",
    "compiler": {"libtpu": "0.0.52"},
    "means": {"prompt": None, "response": 100.0},
    "tokens": 64,
    "expected": expect.as_dict(expected),
    "run": expect.cost([expect.StageTime("sft", 720, expected, "compiled")], 8, 2.0)
    | {"left_out": ["rm (trains nothing)"], "for": "all"},
    "decode": {"layout": "2d", "steps": 6, "step": {"hbm_bytes": 3e9, "wire_bytes": 2e6}},
    "a_run_refuses": "sft.batch_size=32 must be",
    "collectives": found.by_kind,
    "largest_collectives": estimate.largest(found, 5),
    "host_transfers": [],
    "unknown_trips": [],
    "compilation": {"seconds": 1.0, "cpu_seconds": 2.0, "peak_rss_bytes": 2**30},
  }
  lines = estimate.text(report).splitlines()
  report["timing"]["phases"]["update"] |= {"dcn_bytes": 3e9}
  report["timing"]["phases"]["update"]["seconds"]["DCN"] = 0.75
  assert (
    "Between slices, over the data centre's network: 3.000 GB sent a device, estimate 0.750 s; not in"
    " the table's links."
  ) in estimate.text(report).splitlines()
  assert "libtpu 0.0.52" in lines[1] and "responses of 100 tokens on average" in lines[1]
  assert lines[2] == (
    "Fits: takes 3.00 GiB of a device's 15.75 GiB, 12.75 GiB are free; 2.00 GiB are in use at the peak."
  )
  # 3 GiB less 1 + 1/2 and a MiB.
  assert "     1.499 GiB  activations and other temporaries" in lines
  assert "     0.500 GiB  KV cache (rollout only)" in lines
  assert (
    "Decode, layout 2d: 6 steps, each reads and writes 3.00 GB and sends 2.00 MB a device." in lines
  )
  assert (
    "Expected: 10 s an iteration (5 to 20), 6 tokens a second: an estimate, built from" in lines
  )
  # 720 steps of 10 s are two hours, on 8 chips 16, at 2 each.
  assert "  all: 2.0 h (1.0 to 4.0) on 8 chips: 16 chip-hours (8 to 32)" in lines
  assert "  at 2 a chip-hour: 32 (16 to 64)" in lines
  assert "  not counted: rm (trains nothing)" in lines
  assert any(line.endswith(" GB  rollout/add") for line in lines)
  assert "Host transfers: none." in lines
  assert lines[-2].endswith("would be refused. sft.batch_size=32 must be")
  assert not any("Between slices" in line for line in lines)
  assert all(
    "estimate" in line for line in lines if " a second" in line and "s an iteration" in line
  )


@pytest.mark.parametrize(
  "flag, value, words",
  [
    ("_MESH", "fsdp:4", "--search chooses the mesh: leave out --mesh=fsdp:4"),
    ("_COMPILE", False, "leave out --nocompile"),
    ("_MEAN_PROMPT", 20.0, "--mean_prompt=20 is for one mesh"),
    ("_PRICE", 1.2, "--price_per_chip_hour=1.2 is for one mesh"),
    ("_TRY_CHANGES", 0, "--try_changes=0 is for one mesh"),
  ],
)
def test_what_a_search_does_not_take(flag, value, words, monkeypatch):
  unset = dict.fromkeys(("_MESH", "_MEAN_PROMPT", "_MEAN_RESPONSE", "_PRICE", "_TRY_CHANGES"))
  for name, given in (unset | {"_COMPILE": True} | {flag: value}).items():
    holder = types.SimpleNamespace(name=getattr(plan, name).name, value=given)
    monkeypatch.setattr(plan, name, holder)
  with pytest.raises(UserError, match=words):
    plan._search(small("sft"), "sft")


def test_mesh_spelling():
  assert plan.parse_mesh("fsdp:64,tensor:4") == MeshConfig(1, 1, 64, 4)
  assert plan.parse_mesh("data:-1") == MeshConfig(1, -1, 1, 1)
  for sizes in ((2, 1, 64, 4), (1, 2, 1, 1), (1, 1, 1, 1)):
    spelling = estimate.spell_mesh(dict(zip(sharding.MESH_AXES, sizes)))
    assert plan.parse_mesh(spelling) == MeshConfig(*sizes)
  for wrong in ("", "fsdp", "fsdp=4", "model:4", "fsdp:2,fsdp:2", "fsdp:x"):
    with pytest.raises(ValueError, match="must be AXIS:SIZE"):
      plan.parse_mesh(wrong)


@pytest.mark.parametrize(
  "wrong", ["v5e-256", "v9:2x2", "v5e", "v5e:2xx2", "0xv5e:2x2", "x2v5e:2x2"]
)
def test_topology_spelling(wrong):
  with pytest.raises(ValueError, match="must be CHIP:AxB"):
    topology.devices(wrong)


@needs_libtpu
@pytest.mark.parametrize(
  "name, number",
  [("v4:2x2x1", 4), ("v5e:2x4", 8), ("v5p:4x4x4", 64), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)],
)
def test_devices_of_a_slice(name, number):
  with mock.patch.dict(os.environ):  # which asking changes
    assert len(topology.devices(name)) == number


def test_a_program_that_cannot_be_read_still_fits():
  compiled = mock.Mock()
  compiled.as_text.side_effect = jax.errors.JaxRuntimeError("INTERNAL: async-update\nstack")
  sizes = dict(argument=4, output=3, alias=2, temp=1, generated_code=0)
  for name, gib in sizes.items():
    setattr(compiled.memory_analysis(), f"{name}_size_in_bytes", gib * topology.GIB)
  words = r"it fits, 6.00 of 15.75 GiB a device, but .* \(INTERNAL: async-update\)"
  with pytest.raises(UserError, match=words):
    planning._text(compiled, topology.CHIPS["v5e"])


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'instructjax\[plan\]'"):
    topology.devices("v5e:2x2")


def small(stage: str, **changes):
  blocks = {"ppo": {"num_minibatches": 2}, "mesh": {"data": 1, "fsdp": 4}}
  for name, values in changes.items():
    blocks[name] = blocks.get(name, {}) | values
  return from_config_dict(settings(stage, **blocks))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])


@pytest.mark.parametrize("stage", programs.TRAINED)
def test_every_stage_has_a_program(stage, mesh):
  program = programs.make(small("ppo_ptx"), mesh, stage)
  with jax.set_mesh(mesh):
    out = jax.eval_shape(program.step, *program.arguments)
  # The state comes out as it went in, and owners hold every argument once.
  assert jax.tree.map(lambda x: x.shape, out[0]) == jax.tree.map(
    lambda x: x.shape, program.arguments[0]
  )
  ids = lambda tree: sorted(map(id, jax.tree.leaves(tree)))
  assert ids(program.owners) == ids(program.arguments)


@pytest.mark.parametrize(
  "change",
  [
    dict(rollout={"slots": 8}),
    dict(ppo={"packed_rows": 4}),
    dict(ppo={"microbatches": 2, "score_microbatches": 2}),
    dict(adapter={"rank": 4}, ppo_init={"weights": "/given"}, rm={"weights": "/given-too"}),
  ],
)
def test_what_depends_on_lengths_or_is_given_has_a_program(change, mesh):
  program = programs.make(small("ppo_ptx", **change), mesh, "ppo_ptx")
  with jax.set_mesh(mesh):
    out = jax.eval_shape(program.step, *program.arguments)
  assert jax.tree.map(lambda x: x.shape, out[0]) == jax.tree.map(
    lambda x: x.shape, program.arguments[0]
  )


def test_bytes_of_slots(mesh):
  whole = programs.make(small("ppo"), mesh, "ppo").inside
  found = programs.make(small("ppo", rollout={"slots": 8}), mesh, "ppo").inside
  # Half of the rows, and as many prompts that wait, which are half of the columns.
  cache = programs.shard_bytes(whole["KV cache"])
  assert programs.shard_bytes(found["KV cache"]) == cache // 2
  assert programs.shard_bytes(found["KV cache of waiting prompts"]) == cache // 4
  assert "KV cache of waiting prompts" not in whole


def test_bytes_of_rings(mesh):
  """A banded layer keeps the columns of its window, a quarter of them here; prompts that wait have all of theirs."""
  change = {"execution": {"layers": "scan"}, "rollout": {"slots": 8}}
  wide = programs.make(small("ppo", **change), mesh, "ppo").inside
  found = programs.make(small("ppo", **change, model={"attention_window": 64}), mesh, "ppo").inside
  size = lambda inside, name: programs.shard_bytes(inside[name])
  assert size(found, "KV cache") == size(wide, "KV cache") * (1 + 1 / 4) / 2
  assert size(found, "KV cache of waiting prompts") == size(wide, "KV cache of waiting prompts")


def test_rows_of_packed_rankings(mesh):
  config = small("rm", rm={"row_length": 256})
  # 72 answers: a row each if all are as long as they may be; a quarter if all texts are, rounded to four devices.
  assert programs.ranked_rows(config, 4, lengths.BOUND) == (72, 256)
  assert programs.ranked_rows(config, 4, lengths.Means(32.0, 30.0)) == (20, 256)
  assert programs.make(config, mesh, "rm", lengths.Means(32.0, 30.0)).tokens == 20 * 256
  assert programs.ranked_rows(small("rm"), 4, lengths.Means(1.0, 1.0)) == (72, 256)
  # Of 8 prompts of 32 tokens each is read once: 8 * 32 + 72 * 30 in rows of 256.
  means = lengths.Means(32.0, 30.0)
  shared = {"row_length": 256, "share_prompts": True}
  config = small("rm", rm=shared, execution={"attention": "plain"})
  assert programs.ranked_rows(config, 4, means, True) == (12, 256)
  program = programs.make(config, mesh, "rm", means)
  assert program.tokens == 12 * 256
  assert program.arguments[-1].segment_SL.last_BL.shape == (12, 256)
  jax.eval_shape(program.step, *program.arguments)
  # Splash, as on a TPU, takes no trees: there the run has none, and neither has its plan.
  program = programs.make(
    small("rm", rm=shared, execution={"attention": "splash"}), mesh, "rm", means
  )
  assert program.tokens == 20 * 256 and program.arguments[-1].segment_SL.shape == (20, 256)


def test_networks_that_are_given(mesh, monkeypatch):
  """Two adapters of one base share it; what cannot be opened here is taken for two."""
  given = {name: mock.Mock(is_adapter=True, misfit=lambda model: "") for name in ("ppo_init", "rm")}
  for one in given.values():
    one.require_base.return_value = mock.Mock(path="/base")
  config = small("ppo_ptx", adapter={"rank": 4}, ppo_init={"weights": "/a"}, rm={"weights": "/b"})
  base = lambda: programs.shard_bytes(programs.make(config, mesh, "ppo_ptx").owners["base"])
  apart = base()
  monkeypatch.setattr(programs.policies, "given_weights", lambda config: given)
  assert base() < 0.6 * apart
  given["rm"].require_base.return_value = mock.Mock(path="/other")
  assert base() == apart
  with pytest.raises(UserError, match="--stage=rm trains nothing: config.rm.weights='/b' stands"):
    programs.make(config, mesh, "rm")


def test_bytes_by_owner(mesh):
  program = programs.make(small("ppo_ptx"), mesh, "ppo_ptx")
  D, V, T, F, N = 512, 1024, 256, 1024, 2
  split = V * D + T * D + N * (3 * D * D + D * D + 2 * D * F)  # along embed, over four devices
  whole = N * (3 * D + D + F + D + 4 * D) + 2 * D  # biases and norms
  policy = 4 * (split // 4 + whole)
  assert programs.shard_bytes(program.owners["policy master"]) == policy
  assert programs.shard_bytes(program.owners["policy optimiser"]) == 2 * policy + 2 * 4
  tables, norms = V * D + T * D, N * 4 * D + 2 * D  # which stay float32
  reference = 4 * (tables // 4 + norms) + 2 * ((split - tables) // 4 + whole - norms)
  assert programs.shard_bytes(program.owners["reference"]) == reference
  # 16 rows over four devices: keys and values of 256 columns, in bfloat16.
  assert programs.shard_bytes(program.inside["KV cache"]) == 2 * N * (16 // 4) * T * D * 2
  copy = 2 * (split + whole - norms) + 4 * norms
  assert programs.shard_bytes(program.inside["bf16 rollout copy"]) == copy
  assert program.decode_layout == "tensor"
  program = programs.make(small("ppo_ptx", execution={"decode_layout": "2d"}), mesh, "ppo_ptx")
  copy = 2 * (split // 4 + whole - norms) + 4 * norms
  assert programs.shard_bytes(program.inside["bf16 rollout copy"]) == copy
  assert program.decode_layout == "2d"


@pytest.mark.parametrize("stage, head", [("pretrain", 1024 * 512), ("rm", 512)])
def test_model_flops(stage, head, mesh):
  program = programs.make(small("ppo_ptx"), mesh, stage)
  D, L, F, N = 512, 256, 1024, 2
  rows = 8 * (9 if stage == "rm" else 1)
  products = N * (4 * D * D + 2 * D * F) + head
  attention = (
    2 * N * (L / 2) * D
  )  # scores and their sums over values, over half the columns on average
  # Two FLOPs a product, three times: forward, and backward for inputs and for weights.
  assert program.model_flops == pytest.approx(rows * L * 6 * (products + attention), rel=0.01)


@pytest.mark.parametrize(
  "stage, changes, words",
  [
    ("evaluate", {}, "--stage=evaluate must be one of pretrain, "),
    ("sft", {"sft": {"batch_size": 6}}, "config.sft.batch_size=6 must be divisible by mesh"),
    ("rm", {"rm": {"batch_size": 2}}, "config.rm.batch_size=2 must be divisible"),
    ("ppo", {"ppo": {"num_minibatches": 8}}, "num_minibatches = 2 rows must be divisible by mesh"),
    (
      "ppo_ptx",
      {"ppo": {"ptx_microbatches": 32}},
      "ptx_rows / ptx_microbatches = 2 rows must be divisible",
    ),
    ("sft", {"model": {"d_model": 510}}, "embed=510 must be divisible by mesh axis fsdp=4"),
  ],
)
def test_what_does_not_divide(stage, changes, words, mesh):
  with pytest.raises(ValueError, match=words):
    programs.make(small("ppo_ptx", **changes), mesh, stage)


def test_a_hint_has_the_planner_s_own_flag():
  run = "or the mesh to --config.mesh.slice=1 --config.mesh.data=1 --config.mesh.fsdp=32 --config.mesh.tensor=8"
  more = " --config.sft.batch_size=64"
  assert planning.with_mesh_flag(run + more) == f"or the mesh to --mesh=fsdp:32,tensor:8{more}"
  assert planning.with_mesh_flag("nothing") == "nothing"


def jaxpr_flops(jaxpr) -> float:
  """FLOPs of all matrix products, scans, kernels and devices multiplied: an independent count."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[dim] for dim in contracted)
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
    assert eqn.primitive.name != "while", "of unknown length"
    inner = sum(map(jaxpr_flops, jax.extend.core.jaxprs_in_params(eqn.params)))
    if eqn.primitive.name == "scan":
      inner *= eqn.params["length"]
    elif eqn.primitive.name == "pallas_call":
      inner *= math.prod(eqn.params["grid_mapping"].grid)
    elif eqn.primitive.name == "shard_map":
      inner *= eqn.params["mesh"].size
    total += inner
  return total


@needs_libtpu
@pytest.mark.parametrize("fsdp, tensor, remat, passes", [(4, 1, "full", 11), (2, 2, "products", 9)])
def test_a_compiled_step(fsdp, tensor, remat, passes):
  # The step with the least to compile: no dropout, no clipping, no band.
  config = small(
    "pretrain",
    pretrain={"optim": {"clip_norm": None}},
    model={"attention_window": 0},
    execution={"remat": remat},
    mesh={"fsdp": fsdp, "tensor": tensor},
  )
  with mock.patch.dict(os.environ):  # which planning changes
    report = planning.plan(config, "v5e:2x2", "pretrain", planning.Assumed(1, 1))
  mesh = mesh_of(config)
  program = programs.make(config, mesh, "pretrain")
  with jax.set_mesh(mesh):
    jaxpr = program.step.trace(*program.arguments).jaxpr
  sizes = report["memory"]["arguments"]
  assert sum(sizes.values()) == programs.shard_bytes(program.arguments)
  assert report["argument_bytes"] == pytest.approx(sum(sizes.values()), rel=0.01)
  # No product is computed on two devices, the logits' included.
  flops = sum(phase["flops"] for phase in report["timing"]["phases"].values())
  # One block a row and head, in each of two layers.
  product = 2 * 2 * 8 * 4 * 256 * 256 * 128
  # What attention gives is kept, but the jaxpr still has its forward pass a second time; the compiler drops it.
  dead = (11 - passes) * product
  assert 4 * flops == pytest.approx(jaxpr_flops(jaxpr.jaxpr) - dead, rel=0.02)
  (kernels,) = {phase["kernels"] for phase in report["timing"]["phases"].values()} - {0.0}
  # 2 products forward, as many to compute it again, and 3 + 4 backward.
  assert kernels * 0.5 * 197e12 == passes * product / 4
  assert report["host_transfers"] == [] and report["unknown_trips"] == []
  assert report["fits"] and {"all-gather", "reduce-scatter"} <= set(report["collectives"])


@needs_libtpu
def test_two_slices():
  with mock.patch.dict(os.environ):  # which libtpu reads when it compiles, too
    devices = topology.devices("2xv5e:2x2")
    with pytest.raises(ValueError, match="as many slices as the devices lie in, got 2"):
      sharding.make_mesh(MeshConfig(1, 2, 4, 1), devices)
    mesh = sharding.make_mesh(MeshConfig(2, 1, 4, 1), devices)
    assert [{device.slice_index for device in block.flat} for block in mesh.devices] == [{0}, {1}]
    split = NamedSharding(mesh, sharding.spec_of(("embed", "mlp")))
    weight_DF = jax.ShapeDtypeStruct((256, 512), "float32", sharding=split)
    x_BD = jax.ShapeDtypeStruct((64, 256), "float32", sharding=sharding.batch_sharding(mesh))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), out_shardings=split)
    found = costs.summarise(gradient.lower(weight_DF, x_BD).compile().as_text(), 8, 2)
    # Each device's quarter of the gradient crosses once; the rest stays in its slice.
    assert {kind: of for kind, of in found.by_kind.items() if "DCN" in kind} == {
      "DCN all-reduce": (1, 256 * 512 * 4 / 4)
    }
    assert found.host_transfers == []


@needs_libtpu
def test_a_sketch_and_what_to_change_without_a_compiler(monkeypatch):
  config = small("ppo_ptx", mesh={"fsdp": -1}, rollout={"slots": 8})
  assumed = planning.Assumed(100, 20, price=2.0)
  with mock.patch.dict(os.environ):  # which planning changes
    report = planning.outline(config, "v5e:2x2", "ppo_ptx", assumed)
    assert report["fits"] and report["mesh"]["fsdp"] == 4 and report["run"]["chips"] == 4
    report = planning.what_to_change(config, report, assumed, None, [])
    words = estimate.outline(report)
    # A plan that the compiler refuses: two changes are tried, and the first that fits ends it.
    refused = {name: value for name, value in report.items() if name != "sketched_bytes"}
    refused |= {"fits": False, "out_of_memory": estimate.out_of_memory(NEAR_MISS)}
    asked = []

    def compile_apart(command, flags):
      asked.append([*command, *flags])
      held = {"fits": True, "expected": {"seconds": 1.0}, "memory": {"allocated": 2**30}}
      return held if len(asked) == 2 else {"fits": False, "out_of_memory": {"needed": 16.0}}

    monkeypatch.setattr(planning.search, "compile_apart", compile_apart)
    changed = planning.what_to_change(config, refused, assumed, None, ["--topology=v5e:2x2"])
  assert "nothing was compiled" in words and "What to change" in words
  assert "May fit: at least about" in words and "at 2 a chip-hour" in words
  # All answers as long as they may be: slots only cost time.
  assert any(row["flags"] == ["--config.rollout.slots=0"] for row in report["changes"])
  assert len(asked) == 2 and all(words[0] == "--topology=v5e:2x2" for words in asked)
  assert [row["is_compiled"] for row in changed["changes"]][:3] == [True, True, False]
  assert "compiled" in estimate.refusal(changed)
