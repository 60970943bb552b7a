"""Limits and formats of input."""
