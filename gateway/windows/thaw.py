"""Thaw a window, with a receipt of what was measured; or fan it out into many sessions at once.

1. The model must be the one that was frozen: same name, same fingerprint.
2. Put back what was evicted from LMCache's tiers, from the pins, checking every byte.
3. Create a session in the window's lineage (same salt, so its objects hit), with the window's transcript; or give an
existing one that transcript (`gateway.windows.rewind`).
4. Warm, if asked to: `cpu` loads the chunks into LMCache's memory; `gpu` also sends them through the engine once and
reads how many tokens it did not have to compute.

At an earlier turn all of this is about the beginning of the window (`gateway.windows.at_turn`). A thaw `as_text` does 3
alone, under the salt of the model as it is served now: the engine computes the text.

The window itself does not change and can be thawed any number of times. The sessions of a fanout share its KV: nothing
is copied or even read, and what was evicted is restored before the first turn (`restore.restore_for_turn`).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from msgspec import structs

from gateway.dialects import text_transcripts
from gateway.engines.client import EngineClient, Model
from gateway.errors import GatewayError
from gateway.records import Session, Usage, Window, check_session_id
from gateway.sessions import prefix_chain
from gateway.store.types import Text
from gateway.windows import rewind
from gateway.windows.at_turn import Held, held_at, text_at
from gateway.windows.catalog import get_usable_window, served_model, session_exists, session_from_window, session_id_for
from gateway.windows.context import OperationContext, Services, instrumented
from gateway.windows.next_turn import next_turn_ids
from gateway.windows.placement import place
from gateway.windows.restore import Receipt, check_and_restore, missing_kv, restore_and_load
from gateway.windows.rewind import Placed, Replaced, Rewound, target
from gateway.windows.savings import book

Warm = Literal["none", "cpu", "gpu"]
MAX_FANOUT = 100  # sessions


class Thawed(NamedTuple):
    """A session that continues a window, the receipt of its KV, and what it had before if it is an existing one."""

    session: Session
    window: Window
    receipt: Receipt
    replaced: Replaced | None = None


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
    at_turn: int | None = None,
    rewound: Rewound | None = None,
) -> Thawed:
    """Thaw a window, or its beginning up to `at_turn`, into a new session or into the one that is `rewound`.

    `source` and `first_message_hash` are the new session's (see `Session`). With `window`, only that very window and no
    other of the same name. Raises `window_not_found`, also if the window is deleted meanwhile, `window_corrupted` if
    its text is lost, `model_mismatch`, `invalid_request` if there is no such turn, `session_already_exists`,
    `engine_unreachable`, `engine_timeout`, and what `rewind.target` and `rewind.place` raise. KV that is lost or
    damaged raises nothing: the receipt says `partial`, and the engine recomputes it.
    """
    store = ctx.services.store
    window = window or await get_usable_window(ctx.services, ctx.tenant, name)
    model = await served_model(ctx.services, window)
    into = await target(ctx, window, new_session_id, rewound)
    held = await held_at(ctx, window, model, at_turn)
    # A client that sends the whole history without an id continues this session.
    last_reply_hash = None
    if source == "thaw":
        last_reply_hash = prefix_chain.chain((await store.text(held.window)).messages, b"")[-1]
    prefer = into.before.engine if into.before else ""
    placement = place(ctx.services, window.lineage, prefer=prefer, model=model.id, tokens=held.window.token_count)
    if warm == "none":
        receipt = await check_and_restore(ctx, held.window, held.manifest)
    else:
        receipt = await restore_and_load(ctx, held.window, held.manifest, placement.cache)
    session = structs.replace(
        session_from_window(held.window, into.session_id, source),
        first_message_hash=first_message_hash,
        last_reply_hash=last_reply_hash,
    )
    if warm == "gpu" and held.manifest.token_ids:  # the engine refuses an empty prompt
        receipt = await _through_engine(ctx, held, model, receipt, placement.engine)
    placed = await rewind.place(ctx, into, session, window)
    return await _thawed(ctx, placed, held.window, model, replace(receipt, at_turn=at_turn), placement.engine)


async def _thawed(
    ctx: OperationContext, placed: Placed, window: Window, model: Model, receipt: Receipt, at: str = ""
) -> Thawed:
    """The result, with what the thaw saved if the engine, with the URL `at`, has counted that."""
    warnings = (*receipt.warnings, *placed.warnings)
    receipt = replace(receipt, duration_ms=ctx.duration_ms(), warnings=warnings)
    usage = Usage(receipt.prompt_tokens, 1, receipt.cached_tokens)
    saved = await book(
        ctx.services, "thaw", window, model, usage,
        session_id=placed.session.id, first_token_s=receipt.first_token_s, at=at,
    )  # fmt: skip
    return Thawed(placed.session, window, replace(receipt, saved=saved), placed.replaced)


@instrumented
async def thaw_text(
    ctx: OperationContext,
    name: str,
    *,
    new_session_id: str | None,
    warm: Warm,
    at_turn: int | None = None,
    rewound: Rewound | None = None,
) -> Thawed:
    """Thaw only a window's text, for a model that is served differently than when it was frozen, or another one.

    The engine computes all of it: in the session's first turn, or now if `warm` is `gpu`. Raises what `thaw` raises,
    `model_mismatch` only where no model can read the window.
    """
    services, store = ctx.services, ctx.services.store
    window = await get_usable_window(services, ctx.tenant, name)
    into = await target(ctx, window, new_session_id, rewound)
    early = await text_at(services, window, at_turn)
    text = await store.text(early)
    model = await _model_for_text(services, window, text)
    engine = services.engines.for_lineage(window.lineage)
    with services.traces.step("render"):
        ids = await next_turn_ids(engine, model.id, text.frame or {}, text.messages)
    _check_fits(window, model, len(ids))
    session = structs.replace(
        session_from_window(early, into.session_id, "thaw"),
        model=model.id,
        fingerprint=model.fingerprint,
        salt=services.salts.of(ctx.tenant, window.lineage, model.fingerprint),
        token_count=len(ids),
        last_reply_hash=prefix_chain.chain(text.messages, b"")[-1],
    )
    receipt = _receipt_of_text(window, session, warm)
    with services.turns.protect_lineage(ctx.tenant, window.lineage):
        if warm == "gpu" and ids:
            receipt = await _compute_text(ctx, engine, session, ids, receipt)
        placed = await rewind.place(ctx, into, session, window)
    return await _thawed(ctx, placed, early, model, replace(receipt, at_turn=at_turn))


def _receipt_of_text(window: Window, session: Session, warm: Warm) -> Receipt:
    """The receipt of a session that was given only the text of a window."""
    tokens, same = session.token_count, session.salt == window.salt
    warnings = [
        f"only the text was thawed: model {session.model!r} computes its {tokens} tokens"
        f"{', unless the cache has them' if same else ''}"
    ]
    if warm == "cpu":
        warnings.append(
            "`warm: cpu` loaded nothing, as a thaw of the text takes none of the window's KV: `gpu` computes it now"
        )
    chunks = tokens // window.chunk_size if window.chunk_size else 0
    return Receipt(chunks, prompt_tokens=tokens, partial=True, as_text=True, warnings=tuple(warnings))


async def _compute_text(
    ctx: OperationContext, engine: EngineClient, session: Session, ids: Sequence[int], receipt: Receipt
) -> Receipt:
    """Compute the KV of a session that is not in the store yet. If it never is, a sweep removes the KV."""
    await ctx.services.store.mark_orphaned(session.salt, session.tenant, session.lineage)
    with ctx.step("prefill", len(ids)):
        clock = time.monotonic()
        usage = await engine.prefill(session.model, ids, session.salt)
    took = time.monotonic() - clock
    ctx.progress("prefill", len(ids), len(ids))
    return replace(receipt, cached_tokens=usage.cached, prompt_tokens=usage.prompt, first_token_s=took)


async def _model_for_text(services: Services, window: Window, text: Text) -> Model:
    """The model of the window's name, or else the engine's first. Raises `model_mismatch`."""
    served = await services.engines.models()
    model = served.get(window.model) or next(iter(served.values()), None)
    if model is None:
        return await services.engines.model(window.model)  # which says that nothing is served
    is_ids = text_transcripts.kind(text.messages) == text_transcripts.TOKENS
    if is_ids and model.fingerprint != window.fingerprint:
        message = f"window {window.name!r} is a list of token ids, which only its own model can read"
        raise GatewayError("model_mismatch", message, hint=f"serve {window.model!r} as it was")
    return model


def _check_fits(window: Window, model: Model, tokens: int) -> None:
    """Raise `model_mismatch` for a text after which the model cannot take another token."""
    if model.context_limit and tokens >= model.context_limit:
        message = (
            f"window {window.name!r} has {tokens} tokens, and the context of model {model.id!r} {model.context_limit}"
        )
        raise GatewayError("model_mismatch", message, hint="serve a model with a larger context")


async def _through_engine(ctx: OperationContext, held: Held, model: Model, receipt: Receipt, at: str) -> Receipt:
    """Send it through the engine with the URL `at`, or another one if that does not answer."""
    window = held.window
    engine = ctx.services.engines.for_lineage(window.lineage, at)
    with ctx.step("prefill", window.token_count):
        clock = time.monotonic()
        usage = await engine.prefill(model.id, held.manifest.token_ids, window.salt)
    took, warnings = time.monotonic() - clock, receipt.warnings
    if usage.cached is None:
        warnings += ("the engine does not report cached_tokens: start it with --enable-prompt-tokens-details",)
    elif usage.cached < receipt.expected_cached_tokens:
        warnings += (f"the engine reused only {usage.cached} tokens; the tiers have {receipt.chunks_found} chunks",)
    ctx.progress("prefill", window.token_count, window.token_count)
    return replace(
        receipt, cached_tokens=usage.cached, prompt_tokens=usage.prompt, warnings=warnings, first_token_s=took
    )


@instrumented
async def fanout(
    ctx: OperationContext, name: str, count: int, prefix: str | None, at_turn: int | None = None
) -> FannedOut:
    """Thaw a window, or its beginning, into `count` sessions, `PREFIX-1` and so on: all of them, or none if one of the
    ids is taken.

    Raises `window_not_found`, `model_mismatch`, `session_already_exists`, `invalid_session_id`, `invalid_request` if
    there is no such turn.
    """
    services = ctx.services
    window = await get_usable_window(services, ctx.tenant, name)
    stem = prefix or session_id_for(name, suffix_length=len(f"-{count}"))
    check_session_id(f"{stem}-{count}", "prefix")
    # The model as last reported is recent enough: the salt of a turn depends on what is served then.
    model = services.engines.known(window.model) if services.engines.up else None
    if model is None or model.fingerprint != window.fingerprint:
        model = await served_model(services, window)
    if at_turn is not None:
        window, _ = await held_at(ctx, window, model, at_turn)
    sessions = [session_from_window(window, f"{stem}-{number}", "fanout") for number in range(1, count + 1)]
    if taken := await services.store.add_sessions(sessions, source=window):
        raise session_exists(taken, "`prefix`")
    return FannedOut(sessions, window, tuple(missing_kv(window, window.chunk_count)))
