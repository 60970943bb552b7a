"""The process itself: its threads, limits, locks and log."""
