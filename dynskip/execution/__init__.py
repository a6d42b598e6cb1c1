"""One step through the model: its rows, the key-value cache, and the executors that run it."""
