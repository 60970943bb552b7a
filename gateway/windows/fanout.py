"""Fan out: one window, many thawed sessions in one call. They share its KV; no byte is copied, no file is made."""

import time

from gateway.parts import Parts
from gateway.progress import Progress, silent
from gateway.records import Session, Window, check_session_id
from gateway.windows.counted import counted
from gateway.windows.finish import whole_chunks
from gateway.windows.thaw import Receipt, branch_of, found, fresh_id, look, served, taken, usable

MOST = 100


@counted
async def fanout(
    parts: Parts, tenant: str, name: str, count: int, prefix: str | None, progress: Progress = silent
) -> tuple[list[Session], Window, Receipt]:
    """Thaw a window into `count` sessions, `PREFIX-1` and on: all of them, or none where one of the ids is taken.

    They are alike, so each is known by its id alone. Raises `window_not_found`, `model_mismatch`,
    `session_already_exists`, `invalid_session_id`; KV that is lost raises nothing, as in a thaw.
    """
    clock = time.monotonic()
    window = await usable(parts, tenant, name)
    stem = prefix or fresh_id(name, room=len(f"-{count}"))
    check_session_id(f"{stem}-{count}", "prefix")
    receipt = Receipt(chunks_expected=whole_chunks(window), prompt_tokens=window.token_count)
    # What the engines said in the last seconds will do: the salt of a turn goes by what is served then.
    model = parts.engines.known(window.model) if parts.engines.up else None
    if model is None or model.fingerprint != window.fingerprint:
        await served(parts, window)
    await look(parts, window, receipt, progress)
    sessions = [branch_of(window, f"{stem}-{number}", "fanout") for number in range(1, count + 1)]
    # As in a thaw: the window may have been deleted since, and its transcript with it.
    async with parts.pins.lock.hold(alone=False):
        await found(parts, tenant, name)
        if there := await parts.store.add_sessions(sessions):
            raise taken(there)
    receipt.partial = window.kv != "complete" or receipt.chunks_found < receipt.chunks_expected
    receipt.duration_ms = round((time.monotonic() - clock) * 1000, 1)
    return sessions, window, receipt
