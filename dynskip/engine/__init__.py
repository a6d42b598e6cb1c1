"""The serving engine: which requests are resident, which of them step together, and what that costs."""
