"""Methods that decide which depth (layers, or halves of layers) a model can do without."""
