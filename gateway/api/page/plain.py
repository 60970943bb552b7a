"""The plain list: windows and sessions as HTML made by the server, for a browser that runs no scripts.

Such a browser cannot send a key, so where one is set the page only says so.
"""

import html
import re
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response

from gateway.api import auth
from gateway.api.page.files import HEADERS
from gateway.errors import GatewayError, invalid_field
from gateway.records import Session, Window
from gateway.store.types import WindowQuery
from gateway.windows.context import Services

PAGE = 50  # windows, and sessions, of one page
_MOST = 2**31
# Control characters, half surrogate pairs, and what turns the direction of a line or is a tag that nobody sees.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


async def show(request: Request) -> Response:
    """Answer with the list, or with the reason why it is not shown."""
    try:
        body, status = await _lists(request), 200
    except GatewayError as error:
        body, status = _refusal(error), error.status
    headers = {**HEADERS, "cache-control": "no-store"}
    return Response(_document(body), status, headers, "text/html; charset=utf-8")


def visible(text: str) -> str:
    """Text with each character that would not be seen, or would turn others around, as its number."""
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text.replace("\r\n", "\n"))


async def _lists(request: Request) -> str:
    """Both lists. Raises `unauthorized` or `forbidden` exactly where the admin API does, and `invalid_request`."""
    services: Services = request.state.services
    headers, settings = request.scope["headers"], services.settings
    auth.refuse_foreign(headers, settings.allowed_origins)
    tenant = auth.tenant(headers, settings.api_key, settings.allowed_origins)
    offset = _offset(request.query_params.get("offset", "0"))
    windows, window_count = await services.store.list_windows(tenant, WindowQuery(limit=PAGE, offset=offset))
    sessions, session_count = await services.store.list_sessions(
        tenant, state=None, model=None, limit=PAGE, offset=offset
    )
    now = time.time()
    return (
        _table("Windows", window_count, _WINDOW_HEADS, [_window_cells(one, now) for one in windows])
        + _table("Sessions", session_count, _SESSION_HEADS, [_session_cells(one) for one in sessions])
        + _paging(offset, max(window_count, session_count))
    )


def _offset(given: str) -> int:
    if given.isascii() and given.isdigit() and len(given) <= len(str(_MOST)) and int(given) <= _MOST:
        return int(given)
    raise invalid_field("offset", "offset is not a whole number", "open the list without it")


_WINDOW_HEADS = ("name", "description", "tags", "kv", "tokens", "bytes", "model", "frozen", "expires")
_SESSION_HEADS = ("id", "state", "turns", "tokens", "model", "last active")


def _window_cells(one: Window, now: float) -> Sequence[object]:
    expires = "expired" if one.has_expired(now) else _moment(one.expires_at)
    numbers = (f"{one.token_count:,}", f"{one.size_bytes:,}")
    return one.name, one.description, " ".join(one.tags), one.kv, *numbers, one.model, _moment(one.created_at), expires


def _session_cells(one: Session) -> Sequence[object]:
    return one.id, one.state, one.turn_count, f"{one.token_count:,}", one.model, _moment(one.last_active_at)


def _moment(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _table(title: str, total: int, heads: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td><bdi>{_escape(cell)}</bdi></td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else "<p>None here.</p>"
    return f"<h2>{title} ({total:,})</h2><div class=scroll role=region aria-label={title} tabindex=0>{table}</div>"


def _paging(offset: int, total: int) -> str:
    newer = f'<a href="?offset={max(offset - PAGE, 0)}" rel=prev>Newer</a> ' if offset else ""
    older = f'<a href="?offset={offset + PAGE}" rel=next>Older</a>' if offset + PAGE < total else ""
    return f"<p>{newer}{older}</p>"


def _refusal(error: GatewayError) -> str:
    if error.code == "unauthorized":
        return "<p>This gateway asks for a key, which the page keeps in the browser's tab: that needs JavaScript.</p>"
    return f"<p><bdi>{_escape(error.message)}</bdi></p><p>{_escape(error.hint)}</p>"


def _document(body: str) -> str:
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Context Window Gateway</title>"
        '<meta name=viewport content="width=device-width"><link rel=stylesheet href="page.css">'
        '<link rel=icon href="icon.svg"><body class=plain><main><h1>Context Window Gateway</h1>'
        '<p>The plain list. <a href="../">The page</a> shows more, with JavaScript.</p>'
        f"{body}</main></body></html>"
    )


def _escape(cell: object) -> str:
    return html.escape(visible(str(cell)))
