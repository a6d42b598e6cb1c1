"""The OpenAI API over `AsyncLLM`, with a depth per request: needs the extra ``serve``."""
