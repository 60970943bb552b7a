"""Which store the settings name."""

from gateway.errors import StartError
from gateway.settings import Settings
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Store


def store_of(settings: Settings) -> Store:
    """The store that the settings name; entering it opens it. Raises StartError if asyncpg is not installed."""
    path, kept, responses = settings.store_path, settings.turns_kept, settings.responses_kept
    if path is not None:
        return SqliteStore(path, turns_kept=kept, responses_kept=responses)
    try:  # an extra: most gateways have their store in a file
        from gateway.store.postgres.connections import Server  # noqa: PLC0415
        from gateway.store.postgres.store import PostgresStore  # noqa: PLC0415
    except ImportError as error:
        raise StartError("a store on PostgreSQL needs asyncpg: install it, or the extra `postgres`") from error
    server = Server(settings.store_url, settings.store_statement_cache)
    return PostgresStore(server, turns_kept=kept, responses_kept=responses, workers=settings.workers)
