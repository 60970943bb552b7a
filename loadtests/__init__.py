"""Benchmarks, soak tests, fuzzing and attack trials."""
