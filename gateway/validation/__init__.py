"""Bounds and formats of what others send."""
