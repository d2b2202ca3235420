"""What is published of accelerators: peak rates and memory. Imports nothing, so that the planner reads it without JAX.

Called by constraints.py, profiling.py and launch's planner.
"""

# FLOPs a second of one device with dense bfloat16 inputs, by `jax.Device.device_kind`; where JAX sees a
# chip's two cores as two devices, half of the chip's.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,  # v5e
  "TPU v5": 459e12,  # v5p, as the compiler for topologies says it
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

# Kind of device, as JAX names it -> GiB that the TPU's compiler lets a program use. A table, and not what the device
# says, so that all processes decide alike and a compiler can ask for a slice that is not here.
TPU_GIB = {
  "TPU v4": 30.75,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.73,
  "TPU v6 lite": 31.24,
  "TPU7x": 94.74,
}
