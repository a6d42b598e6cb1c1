"""The scheduler against a clock that runs as fast as it can: what a load would see."""
