"""Public peak rates of accelerators. Called by profiling and by launch's planner; imports nothing, JAX included."""

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
