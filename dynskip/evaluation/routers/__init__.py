"""Models that choose a path from the prompt alone, and the share of the oracle's gain that they capture."""
