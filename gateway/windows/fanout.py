"""Fan out: one window, many thawed sessions in one call. They share its KV; no byte is copied, no file is made.

Nor is a file looked at, however many the window has: what was evicted is put back when the first of them begins
(`gateway.windows.resume`).
"""

from gateway.records import Session, Window, check_session_id
from gateway.windows.catalog import get_usable_window, served_model, session_exists, session_from_window, session_id_for
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.restore import missing_kv

MOST = 100


@instrumented
async def fanout(
    services: Services, tenant: str, name: str, count: int, prefix: str | None
) -> tuple[list[Session], Window, list[str]]:
    """Thaw a window into `count` sessions, `PREFIX-1` and on: all of them, or none where one of the ids is taken.

    They are alike, so each is known by its id alone. Return them, their window, and a warning where it has not all of
    its KV. Raises `window_not_found`, `model_mismatch`, `session_already_exists`, `invalid_session_id`.
    """
    window = await get_usable_window(services, tenant, name)
    stem = prefix or session_id_for(name, suffix_length=len(f"-{count}"))
    check_session_id(f"{stem}-{count}", "prefix")
    # What the engines said in the last seconds will do: the salt of a turn goes by what is served then.
    model = services.engines.known(window.model) if services.engines.up else None
    if model is None or model.fingerprint != window.fingerprint:
        await served_model(services, window)
    sessions = [session_from_window(window, f"{stem}-{number}", "fanout") for number in range(1, count + 1)]
    if there := await services.store.add_sessions(sessions, source=window):
        raise session_exists(there)
    return sessions, window, missing_kv(window, window.chunk_count)
