"""Evaluation of finished models: log-probabilities, answers and rewards of given texts, and scorers of text."""
