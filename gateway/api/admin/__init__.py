"""The admin API: its operations, their schemas, and health."""
