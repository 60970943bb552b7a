"""Everything that knows LMCache: its keys, its HTTP interface, its tiers, and our pins next to its objects."""
