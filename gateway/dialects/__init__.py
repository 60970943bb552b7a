"""One file for each client API. A dialect reads a request, writes it for the engine, and reads the reply."""
