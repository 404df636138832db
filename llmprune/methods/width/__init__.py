"""Methods that take out heads and channels."""
