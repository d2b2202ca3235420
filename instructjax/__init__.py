"""The InstructGPT recipe (Ouyang et al. 2022, arXiv:2203.02155) in JAX. Start reading at main.py."""

__version__ = "0.1.0"
