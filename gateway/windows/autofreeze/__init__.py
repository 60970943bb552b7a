"""Automatic freezing: its rules, the policies that decide, and the service that runs them."""
