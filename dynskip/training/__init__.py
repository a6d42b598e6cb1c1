"""Training of models whose one set of weights speaks at several depths."""
