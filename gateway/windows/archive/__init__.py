"""Windows as files: the format, export and import."""
