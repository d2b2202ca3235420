"""Mutants that no test can kill, each with the reason. Called by `__main__`, which counts them apart."""

# Id of the mutant -> why its program does the same as the original, or what it would take to tell them apart.
REASONS: dict[str, str] = {
  "data/batching:_BatchSource.__init__:713c8e": (
    "the size of a cache: a permutation that is drawn again is the same one"
  ),
  "data/batching:lm_batches:556269": "the same: pack_rows never weighs a first token",
}
