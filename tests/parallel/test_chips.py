"""Names of TPU slices. The tables of rates and memory are data."""

import pytest

from instructjax.core.errors import UserError
from instructjax.parallel import chips


@pytest.mark.parametrize(
  "name, kind, devices, slices",
  [
    ("v5litepod-256", "TPU v5 lite", 256, 1),
    ("2xv5litepod-256", "TPU v5 lite", 512, 2),
    ("v5e:16x16", "TPU v5 lite", 256, 1),
    ("v6e-1", "TPU v6 lite", 1, 1),
    ("4xv6e:2x4", "TPU v6 lite", 32, 4),
    # v5p-512 has 512 cores, which are 256 chips; JAX shows a chip as one device.
    ("v5p-512", "TPU v5p", 256, 1),
    ("v5p:8x8x4", "TPU v5p", 256, 1),
    ("v4-8", "TPU v4", 4, 1),
    ("tpu7x:4x4x4", "TPU7x", 128, 1),
  ],
)
def test_slices(name, kind, devices, slices):
  assert chips.slices(name) == chips.Slices(kind, devices, slices)
  assert kind in chips.TPU_GIB and kind in chips.PEAK_FLOPS


@pytest.mark.parametrize(
  "name, words",
  [
    ("v9-8", "must be a TPU slice, as v5litepod-256"),
    ("v5litepod", "must be a TPU slice"),
    ("0xv6e-8", "must be a TPU slice"),
    ("v6e-0", "must be a TPU slice"),
    ("v5e:16", "must be a TPU slice"),
    ("v6e-8\n", "must be a TPU slice"),
    ("", "must be a TPU slice"),
    ("v5p-7", "must have an even size: v5p counts two cores a chip"),
  ],
)
def test_other_names_are_refused(name, words):
  with pytest.raises(UserError) as told:
    chips.slices(name)
  assert words in str(told.value) and "\n" not in str(told.value)
