"""Mutants that no test can kill, each with the reason. Called by `__main__`, which counts them apart."""

# Id of the mutant -> why its program does the same as the original, or what it would take to tell them apart.
REASONS: dict[str, str] = {}
