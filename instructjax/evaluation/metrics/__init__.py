"""Scores of answers in words, each as the official script of its data set computes it. Pure functions of texts."""
