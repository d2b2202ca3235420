"""Peak rates and memory of accelerators.

Called by constraints.py, train/profiling.py and launch's planner. Imports nothing, so that the planner can read it
without JAX.
"""

# `jax.Device.device_kind` -> peak FLOPs a second of one device, with dense bfloat16 inputs. If JAX shows a chip's two
# cores as two devices, a device has half of the chip's rate.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,  # v5e
  "TPU v5": 459e12,  # v5p, under the name that the compiler for topologies gives it
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,  # v6e
  "TPU7x": 1153.5e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}

# `jax.Device.device_kind` -> GiB that the TPU's compiler lets a program use. A table is used instead of asking the
# device, so that all processes decide alike, and so that the planner can ask about a slice that it does not have.
TPU_GIB = {
  "TPU v4": 30.75,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.73,  # v5p, as above
  "TPU v5p": 95.73,
  "TPU v6 lite": 31.24,
  "TPU7x": 94.74,
}
