"""What is deleted and when: expired windows, unneeded KV, and KV over a budget."""
