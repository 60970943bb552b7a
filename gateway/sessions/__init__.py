"""Which session a turn belongs to, and what is recorded of it afterwards."""
