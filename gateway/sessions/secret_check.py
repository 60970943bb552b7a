"""Check that the secret is the store's: with another one no earlier KV is found, silently."""

import logging

from gateway.errors import StartError
from gateway.sessions import salts
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.store.types import StoreUnavailable

log = logging.getLogger(__name__)


async def checked_secret(settings: Settings, store: Store) -> bytes:
    """Return the secret, made on first use. Raises StartError where it is not the one that the store was used with."""
    path = settings.secret_path
    mark, in_use = await store.known_secret()
    if in_use and not path.exists() and not settings.accept_new_secret:
        raise _refusal(settings, "is missing")
    secret = salts.read_secret(path)
    if path.stat().st_mode & 0o077:
        log.warning("secret_file %s can be read by others: chmod 600 it", path)
    own = salts.mark(secret, store.store_id)
    if mark == own:
        return secret
    if mark is not None and in_use:
        if not settings.accept_new_secret:
            raise _refusal(settings, "is not the one that the store was used with")
        log.warning(
            "the secret differs from the store's (accept_new_secret): KV stored under the old one will not be found"
        )
    try:
        await store.remember_secret(own)
    except StoreUnavailable as error:  # a full disk must not keep the gateway from starting: it is done next time
        log.warning("the store could not record its secret: %s", error.message)
    return secret


def _refusal(settings: Settings, what: str) -> StartError:
    return StartError(
        f"secret_file {settings.secret_path} {what}: the KV of {settings.store_path} would not be found again; "
        "restore the secret from a backup, or set accept_new_secret=true to start with another one"
    )
