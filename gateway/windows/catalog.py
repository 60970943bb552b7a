"""Look up and describe windows, and check that one can be used: not expired, and its model served unchanged."""

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.records import MAX_NAME, Session, Window
from gateway.windows.context import OperationContext, Services, instrumented

_CLEARED: Mapping[str, Any] = {"description": "", "tags": ()}
_WITHOUT_TEXT_SHOWN = 5
WITHOUT_TEXT_HINT = (
    "import an export of each, or freeze its session again, under another name; then delete it. "
    "Its KV and token ids are still there, but nothing can begin with it"
)


class NewWindow(NamedTuple):
    """A window that an operation has made, and warnings where it is less than complete."""

    window: Window
    warnings: tuple[str, ...] = ()

    @property
    def receipt(self) -> Mapping[str, Any]:
        """What was seen when the window was made."""
        return self.window.receipt


async def get_window(services: Services, tenant: str, name: str) -> Window:
    """Return a window. Raises `window_not_found`."""
    window = await services.store.window(tenant, name)
    if window is None:
        raise window_not_found(name)
    return window


async def get_usable_window(services: Services, tenant: str, name: str) -> Window:
    """Return a window that has not expired. Raises `window_not_found`: an expired one can only be read."""
    window = await get_window(services, tenant, name)
    if window.expires_at is None or not window.has_expired(time.time()):
        return window
    when = datetime.fromtimestamp(window.expires_at, UTC).isoformat(timespec="seconds")
    raise GatewayError(
        "window_not_found",
        f"window {name!r} expired at {when}",
        hint="before it is deleted, extend it (`PATCH /admin/windows/{name}`) or read its text "
        "(`GET /admin/windows/{name}/messages`)",
        details={"window_name": name, "expired_at": when},
    )


def window_not_found(name: str) -> GatewayError:
    """The error for a window that does not exist."""
    hint, details = "`GET /admin/windows` lists them", {"window_name": name}
    return GatewayError("window_not_found", f"there is no window {name!r}", hint=hint, details=details)


async def served_model(services: Services, window: Window) -> Model:
    """Return the window's model as served now. Raises `model_mismatch` if the window's KV would not fit it."""
    model = await services.engines.model(window.model)
    if model.fingerprint == window.fingerprint:
        return model
    raise GatewayError(
        "model_mismatch",
        f"model {window.model!r} is served with other weights or settings than when {window.name!r} was frozen",
        hint="serve the same weights again, or thaw it `as_text`: then the engine computes its text",
        details={"frozen": window.fingerprint, "served": model.fingerprint},
    )


def pinned_keys(window: Window, token_ids: Sequence[int]) -> list[ObjectKey]:
    """The keys of a window's pinned objects, computed from its token ids, in chunk order."""
    ids = token_ids[: window.chunk_count * window.chunk_size]
    return object_keys(window.model_root, ids, window.chunk_size, window.world_size, window.salt) if ids else []


@instrumented
async def describe(ctx: OperationContext, name: str, changes: Mapping[str, Any]) -> Window:
    """Change a window's `description`, `tags` or `ttl_seconds` (from now on); None clears one.

    Raises `window_not_found`, and `invalid_request` if `changes` is empty.
    """
    if not changes:
        raise GatewayError(
            "invalid_request",
            "nothing to change",
            hint="give `description`, `tags` or `ttl_seconds`; `null` clears one",
        )
    fields = {key: _CLEARED[key] if changes[key] is None else changes[key] for key in _CLEARED if key in changes}
    if "ttl_seconds" in changes:
        ttl = changes["ttl_seconds"]
        fields["expires_at"] = None if ttl is None else time.time() + ttl
    window = await ctx.services.store.describe_window(ctx.tenant, name, fields)
    if window is None:
        raise window_not_found(name)
    return window


async def windows_without_text(services: Services) -> str:
    """Which windows an older version left without their text; empty if there are none. None are added today."""
    names = [name for _, name in await services.store.windows_without_text()]
    if not names:
        return ""
    shown, more = names[:_WITHOUT_TEXT_SHOWN], len(names) - _WITHOUT_TEXT_SHOWN
    rest = f" and {more} more" if more > 0 else ""
    return f"{len(names)} windows have lost their text to an older version: {', '.join(shown)}{rest}"


def session_from_window(window: Window, session_id: str, source: str) -> Session:
    """A new session that continues a window, with its lineage, salt and transcript."""
    now = time.time()
    return Session(
        tenant=window.tenant,
        id=session_id,
        lineage=window.lineage,
        model=window.model,
        fingerprint=window.fingerprint,
        salt=window.salt,
        state="thawed",
        token_count=window.token_count,
        transcript=window.transcript,
        frame=window.frame,
        window=window.name,
        window_transcript=window.transcript,
        created_at=now,
        last_active_at=now,
        source=source,
        title=window.title,
    )


def session_id_for(name: str, suffix_length: int = 0) -> str:
    """A new session id made from a window's name, with room left for a suffix."""
    suffix = f".{secrets.token_hex(4)}"
    return name[: MAX_NAME - len(suffix) - suffix_length] + suffix


def session_exists(session_id: str, parameter: str = "`new_session_id`") -> GatewayError:
    """The error for a session id that is taken, which came from `parameter`, a name in backticks."""
    take_back = "; `into_session` takes that session back to the window" if parameter == "`new_session_id`" else ""
    return GatewayError(
        "session_already_exists",
        f"session {session_id!r} already exists",
        hint=f"choose another {parameter}, or omit it{take_back}",
    )
