"""What every stage that trains stands on: the loop, checkpoints, optimisers, metrics."""
