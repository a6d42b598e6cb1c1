"""Self-speculation: a path that guesses tokens, and how many of them pay; no model, no device."""
