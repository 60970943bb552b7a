"""Look up windows, and check that one can be used: it has not expired, and its model is served unchanged."""

import secrets
import time
from datetime import UTC, datetime

from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.records import MAX_NAME, Manifest, Session, Window
from gateway.windows.context import Services


async def get_window(services: Services, tenant: str, name: str) -> Window:
    """Return a window. Raises `window_not_found`."""
    window = await services.store.window(tenant, name)
    if window is None:
        raise window_not_found(name)
    return window


async def get_usable_window(services: Services, tenant: str, name: str) -> Window:
    """Return a window that has not expired. Raises `window_not_found`: an expired one is there to be read only."""
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
    """The error for a window that is not there."""
    hint, details = "`GET /admin/windows` lists them", {"window_name": name}
    return GatewayError("window_not_found", f"there is no window {name!r}", hint=hint, details=details)


async def served_model(services: Services, window: Window) -> Model:
    """Return the window's model as it is served now. Raises `model_mismatch` where its KV would not fit."""
    model = await services.engines.model(window.model)
    if model.fingerprint == window.fingerprint:
        return model
    raise GatewayError(
        "model_mismatch",
        f"model {window.model!r} is served with other weights or settings than when {window.name!r} was frozen",
        hint="serve the same weights again; the text is still there: `GET /admin/windows/{name}/messages`",
        details={"frozen": window.fingerprint, "served": model.fingerprint},
    )


def pinned_keys(window: Window, manifest: Manifest) -> list[ObjectKey]:
    """Keys of the KV objects that the window pinned, computed from its token ids, in chunk order."""
    ids = manifest.token_ids[: window.chunk_count * window.chunk_size]
    if not ids:
        return []
    return object_keys(window.model_root, ids, window.chunk_size, window.world_size, window.salt)


def session_from_window(window: Window, session_id: str, source: str) -> Session:
    """A new session that continues a window: in its lineage, under its salt, with its transcript."""
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
    )


def session_id_for(name: str, suffix_length: int = 0) -> str:
    """A new session id derived from a window's name, which leaves room for a suffix."""
    suffix = f".{secrets.token_hex(4)}"
    return name[: MAX_NAME - len(suffix) - suffix_length] + suffix


def session_exists(session_id: str) -> GatewayError:
    """The error for a session id that is in use."""
    return GatewayError(
        "session_already_exists",
        f"session {session_id!r} already exists",
        hint="choose another `new_session_id`, or omit it",
    )
