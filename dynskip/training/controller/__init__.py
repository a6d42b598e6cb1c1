"""Training a controller on a frozen model, or together with it."""
