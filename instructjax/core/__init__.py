"""What every other folder may import: configuration, errors, and the arrays that travel between parts."""
