"""The paper's experiments: what each one runs, and the numbers that it finds."""
