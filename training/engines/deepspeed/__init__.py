"""DeepSpeed under our own loop, with the recipe, loaders and results of the other engines."""
