"""A pretrained model tuned to speak along a menu of paths, as an adapter or whole."""
