"""A run of the evaluation: its setup, its data, its checkpoints, its store of items."""
