"""Turns files, dataset builders and the default preset's text into seeded, resumable batches of numpy arrays.

Data flows through the modules in this order: readers (file formats), records (what a record is), sources (which records
to load), tokenizer and tokenize (token ids), packing (rows), batching (batches).
"""
