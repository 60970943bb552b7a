"""Authentication: one key for every API. It decides the tenant, of which there is one for now."""

import hmac
import ipaddress
from collections.abc import Collection, Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from gateway.errors import GatewayError
from gateway.validation.shown import shown

TENANT = "default"
KEY_HEADERS = (b"authorization", b"x-api-key")
_PAGE_HEADERS = frozenset({b"origin", b"sec-fetch-site"})
_BROWSER_HEADERS = _PAGE_HEADERS | {b"host"}
_OWN_SITE = (b"same-origin", b"none")
# Names that nobody can register in public: RFC 6761, 6762 and 8375, and ICANN's resolution on .internal.
_RESERVED = (".localhost", ".local", ".internal", ".test", ".home.arpa")


def tenant(headers: Collection[tuple[bytes, bytes]], api_key: str, allowed_origins: Collection[str] = ()) -> str:
    """Return the tenant of a request.

    Raises `unauthorized` if a key is set and the request does not carry it. If none is set, raises `forbidden` for a
    request that a page of another site made a browser send, and for one to a public name: a page can make its own name
    resolve to this machine (DNS rebinding), and the browser then takes the gateway for the page's own site.
    """
    if not api_key:
        refuse_foreign(headers, allowed_origins)
        host = _header(headers, b"host")
        if not _is_private(host):
            raise GatewayError(
                "forbidden",
                f"requests to {shown(host.decode('latin-1'), 200)} are served only with a key",
                hint="set api_key (CWG_API_KEY), or use an IP address or localhost",
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


def refuse_foreign(headers: Iterable[tuple[bytes, bytes]], allowed_origins: Collection[str] = ()) -> None:
    """Raise `forbidden` for a request that a page of another site made a browser send.

    A browser adds `Origin` to every POST. To a GET for an image or a link it adds `Sec-Fetch-Site` instead, unless the
    page's own address is plain http and not local (W3C Fetch Metadata, 2.3).
    """
    found = {name: value for name, value in headers if name in _BROWSER_HEADERS}
    if not found.keys() & _PAGE_HEADERS:  # no browser: agents and SDKs
        return
    origin = found.get(b"origin")
    if origin is not None:
        allowed = origin.partition(b"://")[2] == found.get(b"host", b"") or origin.decode("latin-1") in allowed_origins
    else:
        allowed = found.get(b"sec-fetch-site", b"none").strip().lower() in _OWN_SITE
    if not allowed and "*" not in allowed_origins:
        raise GatewayError(
            "forbidden",
            f"requests from {shown((origin or b'another site').decode('latin-1'), 200)} are not served here",
            hint="if that page is yours, name its origin in allowed_origins, or set api_key",
        )


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    return next((value for name, value in headers if name == wanted), b"")


def _bare(value: bytes) -> bytes:
    scheme, _, rest = value.partition(b" ")
    return rest.strip() if scheme.lower() == b"bearer" else value.strip()


@lru_cache(maxsize=256)
def _is_private(host: bytes) -> bool:
    """Whether a Host header is an address or a name that cannot be registered in public.

    Whoever resolves such names on this network is trusted.
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
