"""The page's own files, read once at the start: HTML, one stylesheet and plain ES modules, without a build step."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType

from blake3 import blake3

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CSP = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No string becomes markup or code: innerHTML and its kin throw (W3C Trusted Types).
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": _CSP,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
)
"""Of every answer of the page: nothing from another host, no inline script or style, in nobody's frame."""


@dataclass(frozen=True, slots=True)
class File:
    """One file, and the ETag by which a browser asks whether it has changed."""

    body: bytes
    content_type: str
    etag: str


def load() -> dict[str, File]:
    """Read every file of the page, by its path below `/ui/`."""
    return dict(_walk(files("gateway.api.page") / "static", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, File]]:
    found: list[tuple[str, File]] = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += _walk(entry, f"{name}/")
        elif (suffix := name[name.rfind(".") :]) in _TYPES:
            body = entry.read_bytes()
            found.append((name, File(body, _TYPES[suffix], f'"{blake3(body).hexdigest(16)}"')))
    return found
