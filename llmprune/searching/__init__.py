"""Looking for how much a model can lose: sweeps, a scan of every layer, and the smallest model within a budget."""
