"""What runs: each stage of the recipe, and the pipeline that orders them."""
