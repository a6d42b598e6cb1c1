"""Training a small model from nothing, as opt-mini was."""
