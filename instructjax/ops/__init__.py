"""Array mathematics of the recipe: pure functions, no config, no model, no state."""
