"""Thaw a window into a new session, with a receipt of what was measured; or fan it out into many sessions at once.

1. The model must be the one that was frozen: same name, same fingerprint.
2. Put back what was evicted from LMCache's tiers, from the pins, checking every byte.
3. Create a session in the window's lineage (same salt, so its objects hit), with the window's transcript.
4. Warm, if asked to: `cpu` loads the chunks into LMCache's memory; `gpu` also sends them through the engine once and
reads how many tokens it did not have to compute.

The window itself does not change and can be thawed any number of times. The sessions of a fanout share its KV: nothing
is copied or even read, and what was evicted is restored before the first turn (`restore.restore_for_turn`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from gateway.engines.client import Model
from gateway.records import Manifest, Session, Window, check_session_id
from gateway.sessions import prefix_chain
from gateway.windows.catalog import get_usable_window, served_model, session_exists, session_from_window, session_id_for
from gateway.windows.context import OperationContext, instrumented
from gateway.windows.restore import Receipt, check_and_restore, missing_kv, restore_and_load

Warm = Literal["none", "cpu", "gpu"]
MAX_FANOUT = 100  # sessions


class Thawed(NamedTuple):
    """A session made from a window, and the receipt of its KV."""

    session: Session
    window: Window
    receipt: Receipt


class FannedOut(NamedTuple):
    """The sessions made from a window, and a warning if it does not have all of its KV."""

    sessions: Sequence[Session]
    window: Window
    warnings: tuple[str, ...]


@instrumented
async def thaw(
    ctx: OperationContext,
    name: str,
    *,
    new_session_id: str | None,
    warm: Warm,
    source: str = "thaw",
    first_message_hash: bytes | None = None,
    window: Window | None = None,
) -> Thawed:
    """Thaw a window into a new session; `source` and `first_message_hash` are the session's (see `Session`).

    With `window`, only that very window and no other of the same name. Raises `window_not_found`, also if the window is
    deleted meanwhile, `window_corrupted` if its text is lost, `model_mismatch`, `session_already_exists`,
    `engine_unreachable`, `engine_timeout`. KV that is lost or damaged raises nothing: the receipt says `partial`, and
    the engine recomputes it.
    """
    store = ctx.services.store
    window = window or await get_usable_window(ctx.services, ctx.tenant, name)
    model = await served_model(ctx.services, window)
    session_id = new_session_id or session_id_for(name)
    if await store.session(ctx.tenant, session_id):
        raise session_exists(session_id)
    # A client that sends the whole history without an id continues this session.
    last_reply_hash = prefix_chain.chain((await store.text(window)).messages, b"")[-1] if source == "thaw" else None
    manifest = await store.manifest(window)
    restore_kv = check_and_restore if warm == "none" else restore_and_load
    receipt = await restore_kv(ctx, window, manifest)
    session = replace(
        session_from_window(window, session_id, source),
        first_message_hash=first_message_hash,
        last_reply_hash=last_reply_hash,
    )
    if warm == "gpu":
        receipt = await _through_engine(ctx, window, model, manifest, receipt)
    # The window may have been deleted meanwhile, and its transcript with it: the store checks again.
    if await store.add_sessions([session], source=window):
        raise session_exists(session_id)
    return Thawed(session, window, replace(receipt, duration_ms=ctx.duration_ms()))


async def _through_engine(
    ctx: OperationContext, window: Window, model: Model, manifest: Manifest, receipt: Receipt
) -> Receipt:
    ctx.progress("prefill", 0, window.token_count)
    engine = ctx.services.engines.for_lineage(window.lineage)
    usage = await engine.prefill(model.id, manifest.token_ids, window.salt)
    warnings = receipt.warnings
    if usage.cached is None:
        warnings += ("the engine does not report cached_tokens: start it with --enable-prompt-tokens-details",)
    elif usage.cached < min(receipt.chunks_found * window.chunk_size, window.token_count - 1):
        warnings += (f"the engine reused only {usage.cached} tokens; the tiers have {receipt.chunks_found} chunks",)
    ctx.progress("prefill", window.token_count, window.token_count)
    return replace(receipt, cached_tokens=usage.cached, prompt_tokens=usage.prompt, warnings=warnings)


@instrumented
async def fanout(ctx: OperationContext, name: str, count: int, prefix: str | None) -> FannedOut:
    """Thaw a window into `count` sessions, `PREFIX-1` and so on: all of them, or none if one of the ids is taken.

    Raises `window_not_found`, `model_mismatch`, `session_already_exists`, `invalid_session_id`.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    stem = prefix or session_id_for(name, suffix_length=len(f"-{count}"))
    check_session_id(f"{stem}-{count}", "prefix")
    # The model as last reported is recent enough: the salt of a turn depends on what is served then.
    model = services.engines.known(window.model) if services.engines.up else None
    if model is None or model.fingerprint != window.fingerprint:
        await served_model(services, window)
    sessions = [session_from_window(window, f"{stem}-{number}", "fanout") for number in range(1, count + 1)]
    if taken := await services.store.add_sessions(sessions, source=window):
        raise session_exists(taken, "`prefix`")
    return FannedOut(sessions, window, tuple(missing_kv(window, window.chunk_count)))
