"""Methods that decide which experts a model can do without."""
