"""Mutants that no test can kill, each with the reason. Called by `__main__`, which counts them apart."""

# Id of the mutant -> why its program does the same as the original, or what it would take to tell them apart.
REASONS: dict[str, str] = {
  "data/batching:_BatchSource.__init__:713c8e": (
    "the size of a cache: a permutation that is drawn again is the same one"
  ),
  "data/batching:Batches.__init__:659752": "a batch is made ahead, in the same order",
  "data/batching:_checksum:556269": "where a checksum starts; it is compared with its like only",
  "data/checksums:FileChecksums._digest:b46390": "a moment exactly at the end of an interval",
  "data/sources:_is_held_out:46a526": "a digest exactly at the edge, one of 2^64",
  "rl/step:create_state:eeb479": "there is an optimiser of the values where there are values",
  "ops/surrogate:clipped_value_loss:2bad5b": "the maximum of two arguments in the other order",
}
