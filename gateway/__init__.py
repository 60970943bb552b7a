"""Context Window Gateway: durable, nameable, lossless KV caches for conversations on vLLM."""

__version__ = "0.1.0"
