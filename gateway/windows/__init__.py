"""Window operations. Each is one file that reads from top to bottom."""
