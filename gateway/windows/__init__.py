"""The product: windows. Each verb is one file and reads from top to bottom."""
