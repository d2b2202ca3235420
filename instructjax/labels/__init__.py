"""The labeling application: people write demonstrations and rank answers in a browser.

`instructjax/label.py` is its command. Nothing here imports JAX: answers are sampled by the command.
"""
