"""Finding the parts of a model that can be pruned."""
