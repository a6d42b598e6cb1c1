"""Training of small OPT models whose one set of weights speaks at several depths."""
