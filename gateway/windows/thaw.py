"""Thaw a window into a new session, with a receipt of what was measured.

1. The model must be the one that was frozen: same name, same fingerprint.
2. Put back what eviction took from LMCache's tiers, from the pins, checking every byte.
3. Make a session in the window's lineage (same salt, so its objects hit), with the window's transcript.
4. Warm, if asked to: `cpu` loads the chunks into LMCache's memory; `gpu` also sends them through the engine once and
reads how many tokens it did not have to compute.

The window itself does not change and can be thawed any number of times.
"""

import time
from dataclasses import replace
from typing import Literal

from gateway.engines.client import Model
from gateway.records import Manifest, Session, Window
from gateway.runtime.progress import Progress, silent
from gateway.sessions import prefix_chain
from gateway.windows.catalog import get_usable_window, served_model, session_exists, session_from_window, session_id_for
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.restore import Receipt, restore, restore_and_load

Warm = Literal["none", "cpu", "gpu"]


@instrumented
async def thaw(
    services: Services,
    tenant: str,
    name: str,
    *,
    new_session_id: str | None,
    warm: Warm,
    source: str = "thaw",
    first_message_hash: bytes | None = None,
    progress: Progress = silent,
    seen: Window | None = None,
) -> tuple[Session, Window, Receipt]:
    """Thaw a window into a new session; `source` and `first_message_hash` are the session's (see `Session`).

    With `seen`, only that very window and not another of its name. Raises `window_not_found`, also where the window is
    deleted meanwhile, `window_corrupted` where its text is gone, `model_mismatch`, `session_already_exists`,
    `engine_unreachable`, `engine_timeout`. KV that is lost or damaged raises nothing: the receipt says `partial`, the
    text is all there, and the engine recomputes.
    """
    clock = time.monotonic()
    window = seen or await get_usable_window(services, tenant, name)
    model = await served_model(services, window)
    session_id = new_session_id or session_id_for(name)
    if await services.store.session(tenant, session_id):
        raise session_exists(session_id)
    # Whoever sends the whole history, and no id, goes on here.
    last_reply_hash = (
        prefix_chain.chain((await services.store.text(window)).messages, b"")[-1] if source == "thaw" else None
    )
    manifest = await services.store.manifest(window)
    bring_back = restore if warm == "none" else restore_and_load
    receipt = await bring_back(services, window, manifest, progress)
    session = replace(
        session_from_window(window, session_id, source),
        first_message_hash=first_message_hash,
        last_reply_hash=last_reply_hash,
    )
    if warm == "gpu":
        await _through_engine(services, window, model, manifest, receipt, progress)
    # While we warmed, the window may have been deleted, and its transcript with it: the store looks again.
    if await services.store.add_sessions([session], source=window):
        raise session_exists(session_id)
    receipt.duration_ms = round((time.monotonic() - clock) * 1000, 1)
    return session, window, receipt


async def _through_engine(
    services: Services, window: Window, model: Model, manifest: Manifest, receipt: Receipt, progress: Progress
) -> None:
    progress("prefill", 0, window.token_count)
    usage = await services.engines.for_lineage(window.lineage).prefill(model.id, manifest.token_ids, window.salt)
    receipt.cached_tokens, receipt.prompt_tokens = usage.cached, usage.prompt
    if usage.cached is None:
        receipt.warnings.append(
            "the engine does not report cached_tokens: start it with --enable-prompt-tokens-details"
        )
    elif usage.cached < min(receipt.chunks_found * window.chunk_size, window.token_count - 1):
        receipt.warnings.append(
            f"the engine found {usage.cached} tokens of the {receipt.chunks_found} chunks in the tiers"
        )
    progress("prefill", window.token_count, window.token_count)
