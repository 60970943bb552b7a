"""The OpenAI-compatible API: from a request to the engine's answer."""
