"""The store on PostgreSQL (15 or newer), for several gateways. Needs asyncpg: the extra `postgres`."""
