"""What is deleted and when: expired windows, KV that nobody needs, and the bytes in each tier."""
