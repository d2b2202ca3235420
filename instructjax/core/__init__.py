"""Code that every other folder may import: the configuration, the errors, and the arrays that parts exchange."""
