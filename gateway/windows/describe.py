"""Describe: change a window's description, tags and time to live. Its content never changes."""

import time
from collections.abc import Mapping
from typing import Any

from gateway.errors import GatewayError
from gateway.records import Window
from gateway.windows.catalog import window_not_found
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented

_CLEARED: Mapping[str, Any] = {"description": "", "tags": ()}


@instrumented
async def describe(services: Services, tenant: str, name: str, said: Mapping[str, Any]) -> Window:
    """Change `description`, `tags` or `ttl_seconds` (from now on); None clears. Raises `window_not_found`.

    What is not in `said` stays. Raises `invalid_request` where nothing is said at all.
    """
    if not said:
        raise GatewayError(
            "invalid_request",
            "nothing to change",
            hint="give `description`, `tags` or `ttl_seconds`; `null` clears one",
        )
    changes = {field: _CLEARED[field] if said[field] is None else said[field] for field in _CLEARED if field in said}
    if "ttl_seconds" in said:
        ttl = said["ttl_seconds"]
        changes["expires_at"] = None if ttl is None else time.time() + ttl
    window = await services.store.describe_window(tenant, name, changes)
    if window is None:
        raise window_not_found(name)
    return window
