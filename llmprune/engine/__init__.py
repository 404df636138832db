"""Running the model layer by layer, without knowing any model."""
