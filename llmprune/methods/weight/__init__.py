"""Methods that set single weights to zero and may move the others."""
