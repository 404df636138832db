"""Building blocks that methods share: solutions for a given mask, refinements of a mask, targets."""
