"""The durable tiers that LMCache writes to, as the gateway sees them."""
