"""Measurements of the gateway, beside its peers in one run."""
