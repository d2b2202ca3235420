"""XLA options under which tiny programs compile in a third of the time. Imports no jax: flags come before it."""

import importlib.metadata

OPTIONS: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
# Later ones have one way to compile for a CPU; they end the process at a flag that they do not know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())
