"""What speaks to clients: the HTTP server, authentication, and the three APIs on it."""
