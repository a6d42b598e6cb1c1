"""From the ``paths`` argument to the rows of each layer; pure data."""
