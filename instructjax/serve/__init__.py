"""After training: answering prompts, and packages of weights for other programs."""
