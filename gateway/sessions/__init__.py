"""Which session a turn belongs to, and what is recorded of it when it is over."""
