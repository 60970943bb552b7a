"""Client APIs, one file each. A dialect reads a request, writes it for the engine, and reads the reply."""
