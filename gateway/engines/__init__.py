"""vLLM: the engines, their health, and the connections to them."""
