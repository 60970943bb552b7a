"""Who is asking. One key guards every door; tenants come from it, and for now there is one."""

import hmac
import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from gateway.errors import GatewayError

TENANT = "default"
KEY_HEADERS = (b"authorization", b"x-api-key")
# Names that nobody can register and show to the world: RFC 6761, 6762 and 8375, and ICANN's resolution on .internal.
_RESERVED = (".localhost", ".local", ".internal", ".test", ".home.arpa")


def tenant(headers: Iterable[tuple[bytes, bytes]], api_key: str) -> str:
    """Return the tenant of a request.

    Raises `unauthorized` when a key is set and the request does not carry it, and `forbidden` when none is set and the
    request was sent to a name that may be anybody's: a page can make its own name mean this machine (DNS rebinding),
    and its browser believes then that we are its own site.
    """
    if not api_key:
        host = next((value for name, value in headers if name == b"host"), b"")
        if not _is_ours(host):
            raise GatewayError(
                "forbidden",
                f"requests to {host.decode('latin-1')!r:.200} are served with a key only",
                hint="set api_key (CWG_API_KEY), or ask by address or as localhost",
            )
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


@lru_cache(maxsize=256)
def _is_ours(host: bytes) -> bool:
    """Whether a Host header cannot be a name that somebody on the internet has pointed here.

    It is an address, or a name without a public owner; who answers for such names on this network is trusted.
    """
    try:
        name = (urlsplit(f"//{host.decode('latin-1')}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_RESERVED)
    return True
