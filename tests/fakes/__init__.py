"""Neighbours that speak real HTTP over real sockets, for the faults that the real ones cannot be made to do."""
