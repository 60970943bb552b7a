"""Who is asking. One key guards every door; tenants come from it, and for now there is one."""

import hmac
from collections.abc import Iterable

from gateway.errors import GatewayError

TENANT = "default"
KEY_HEADERS = (b"authorization", b"x-api-key")


def tenant(headers: Iterable[tuple[bytes, bytes]], api_key: str) -> str:
    """Return the tenant of a request. Raises `unauthorized` when a key is set and the request does not carry it."""
    if not api_key:
        return TENANT
    wanted = api_key.encode()
    for name, value in headers:
        if name in KEY_HEADERS and hmac.compare_digest(_bare(value), wanted):
            return TENANT
    raise GatewayError(
        "unauthorized",
        "the API key is missing or wrong",
        hint="send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
    )


def _bare(value: bytes) -> bytes:
    scheme, _, rest = value.partition(b" ")
    return rest.strip() if scheme.lower() == b"bearer" else value.strip()
