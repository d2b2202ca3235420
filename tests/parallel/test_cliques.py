import re

import jax
import numpy as np

from instructjax.core.config import MeshConfig
from instructjax.parallel import cliques, sharding


def test_every_set_of_split_axes_is_a_clique():
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=2, tensor=2))
  assert cliques.axes(mesh) == [
    ("data",), ("fsdp",), ("tensor",),
    ("data", "fsdp"), ("data", "tensor"), ("fsdp", "tensor"),
    ("data", "fsdp", "tensor"),
  ]  # fmt: skip
  assert cliques.axes(sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])) == []


def test_the_program_communicates_in_every_clique():
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=4, tensor=1))
  number_D = np.arange(8, dtype=np.float32)
  program = cliques.meeting(mesh).lower(number_D).compile()
  groups = set(re.findall(r"all-reduce.*replica_groups=(\S+),", program.as_text()))
  assert len(groups) == 3  # data, fsdp and both
  over_data, over_fsdp, over_both = map(np.asarray, program(number_D))
  np.testing.assert_array_equal(over_data, [4, 6, 8, 10] * 2)
  np.testing.assert_array_equal(over_fsdp, [6] * 4 + [22] * 4)
  np.testing.assert_array_equal(over_both, [28] * 8)


def test_a_single_process_has_nobody_to_connect_with():
  cliques.connect(sharding.make_mesh(MeshConfig(slice=1, data=8, fsdp=1, tensor=1)))
