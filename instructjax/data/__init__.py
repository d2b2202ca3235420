"""From files, builders and the default preset's text to seeded, resumable numpy batches.

records (what a record is) -> sources (where records come from) -> tokenizer -> packing -> pipeline
(batches).
"""
