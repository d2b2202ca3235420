"""The CPU's devices are there before a test plans: planning changes the environment that says how many there are."""

import jax

jax.devices()
