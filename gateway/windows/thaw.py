"""Thaw: a new session goes on from a window, and "thawed" comes with what was measured.

1. The model must be the one that was frozen: same name, same fingerprint.
2. Put back what eviction took from LMCache's tiers, from the pins, checking every byte.
3. Make a session in the window's lineage (same salt, so its objects hit), with the window's transcript.
4. Warm, if asked to: `cpu` loads the chunks into LMCache's memory; `gpu` also sends them through the engine once and
reads how many tokens it did not have to compute.

The window itself does not change and can be thawed any number of times.
"""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from gateway.engines.client import Model
from gateway.errors import GatewayError
from gateway.kv.keys import ObjectKey, object_keys
from gateway.kv.lmcache import LMCache
from gateway.kv.tiers.base import Restored
from gateway.records import MAX_NAME, Manifest, PinnedObject, Session, Window
from gateway.runtime.progress import Progress, silent
from gateway.sessions import prefix_chain
from gateway.windows.context import Services
from gateway.windows.instrumented import instrumented
from gateway.windows.receipt import whole_chunks

Warm = Literal["none", "cpu", "gpu"]


@dataclass(slots=True)
class Receipt:
    """What a thaw saw. `cached_tokens` is the engine's own count, None unless it was asked (`warm: gpu`)."""

    chunks_expected: int
    chunks_found: int = 0
    chunks_relinked: int = 0
    chunks_corrupt: int = 0
    chunks_prefetched: int | None = None
    cached_tokens: int | None = None
    prompt_tokens: int = 0
    partial: bool = False
    duration_ms: float = 0.0
    warnings: list[str] = field(default_factory=list)


@instrumented
async def thaw(
    services: Services,
    tenant: str,
    name: str,
    *,
    new_session_id: str | None,
    warm: Warm,
    source: str = "thaw",
    head: bytes | None = None,
    progress: Progress = silent,
    seen: Window | None = None,
) -> tuple[Session, Window, Receipt]:
    """Thaw a window into a new session; `source` and `head` are the session's (see `Session`).

    With `seen`, only that very window and not another of its name. Raises `window_not_found`, also where the window is
    deleted meanwhile, `window_corrupted` where its text is gone, `model_mismatch`, `session_already_exists`,
    `engine_unreachable`, `engine_timeout`. KV that is lost or damaged raises nothing: the receipt says `partial`, the
    text is all there, and the engine recomputes.
    """
    clock = time.monotonic()
    window = seen or await usable(services, tenant, name)
    model = await served(services, window)
    session_id = new_session_id or fresh_id(name)
    if await services.store.session(tenant, session_id):
        raise taken(session_id)
    # Whoever sends the whole history, and no id, goes on here.
    tip = prefix_chain.chain((await services.store.text(window)).messages, b"")[-1] if source == "thaw" else None
    manifest = await services.store.manifest(window)
    receipt = Receipt(chunks_expected=whole_chunks(window), prompt_tokens=window.token_count)
    await restore(services, window, manifest.objects, receipt, progress)
    session = replace(branch_of(window, session_id, source), head=head, tip=tip)
    if warm != "none" and receipt.chunks_found:
        await _warm(services, window, model, manifest, warm, receipt, progress)
    elif warm == "gpu":
        await _through_engine(services, window, model, manifest, receipt, progress)
    # While we warmed, the window may have been deleted, and its transcript with it: the store looks again.
    if not await services.store.add_session(session, source=window):
        raise taken(session_id)
    receipt.partial = window.kv != "complete" or receipt.chunks_found < receipt.chunks_expected
    receipt.duration_ms = round((time.monotonic() - clock) * 1000, 1)
    return session, window, receipt


async def found(services: Services, tenant: str, name: str) -> Window:
    """Return a window. Raises `window_not_found`."""
    window = await services.store.window(tenant, name)
    if window is None:
        raise not_found(name)
    return window


def branch_of(window: Window, session_id: str, source: str) -> Session:
    """A session that goes on from a window: in its lineage, under its salt, with its transcript."""
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


async def usable(services: Services, tenant: str, name: str) -> Window:
    """Return a window that has not expired. Raises `window_not_found`: an expired one is there to be read only."""
    window = await found(services, tenant, name)
    if window.expires_at is None or not window.has_expired(time.time()):
        return window
    when = datetime.fromtimestamp(window.expires_at, UTC).isoformat(timespec="seconds")
    raise GatewayError(
        "window_not_found",
        f"window {name!r} expired at {when}",
        hint="give it more time (PATCH its ttl_seconds), or read its text (its messages), before it is deleted",
        details={"window_name": name, "expired_at": when},
    )


def not_found(name: str) -> GatewayError:
    """The error for a window that is not there."""
    hint, details = "GET /admin/windows lists them", {"window_name": name}
    return GatewayError("window_not_found", f"there is no window {name!r}", hint=hint, details=details)


async def served(services: Services, window: Window) -> Model:
    """Return the window's model as it is served now. Raises `model_mismatch` where its KV would be wrong."""
    model = await services.engines.model(window.model)
    if model.fingerprint == window.fingerprint:
        return model
    raise GatewayError(
        "model_mismatch",
        f"model {window.model!r} is served with other weights or settings than when {window.name!r} was frozen",
        hint="serve the same weights again; the text is still there: GET /admin/windows/{name}/messages",
        details={"frozen": window.fingerprint, "served": model.fingerprint},
    )


async def restore(
    services: Services, window: Window, objects: Sequence[PinnedObject], receipt: Receipt, progress: Progress
) -> None:
    """Put back what eviction took, checking every byte; what is lost is in the receipt.

    Raises `window_not_found` where the window was deleted since it was read.
    """
    progress("restore", 0, window.chunk_count)
    async with held(services, window):
        await _put_back(services, window, objects, receipt)
    warn(window, receipt)


@asynccontextmanager
async def held(services: Services, window: Window) -> AsyncIterator[None]:
    """Keep a window and its pins from being deleted for the block. Raises `window_not_found` if that was done before.

    Whoever puts objects back pins what has lost its pin: of a window that was deleted nobody would take them away.
    """
    async with services.pins.lock.acquire(alone=False):
        await services.store.check_there(window)
        yield


def warn(window: Window, receipt: Receipt) -> None:
    """Put into the receipt what of the window's KV will have to be computed again."""
    if window.kv == "absent":
        receipt.warnings.append(f"the window holds no KV: the engine computes its {window.token_count} tokens again")
    elif receipt.chunks_found < receipt.chunks_expected:
        lost = receipt.chunks_expected - receipt.chunks_found
        receipt.warnings.append(
            f"the KV of {lost} of {receipt.chunks_expected} chunks is lost: the engine recomputes it"
        )


async def _put_back(services: Services, window: Window, objects: Sequence[PinnedObject], receipt: Receipt) -> None:
    by_tier, warnings = await services.pins.restore(objects)
    receipt.warnings += warnings
    if damaged := _count(window, objects, by_tier, receipt):
        receipt.warnings.append(f"{receipt.chunks_corrupt} chunks did not match their checksum and were taken away")
        await _forget(services, damaged, receipt)


def _count(
    window: Window, objects: Sequence[PinnedObject], by_tier: Mapping[str, Mapping[str, Restored]], receipt: Receipt
) -> list[ObjectKey]:
    """Put into the receipt what became of each chunk; return the objects that were damaged in some tier."""
    keys = list(dict.fromkeys(one.key for one in objects))  # in chunk order
    chunk_of = {key: index // window.world_size for index, key in enumerate(keys)}
    seen: dict[Restored, set[str]] = {state: set() for state in Restored}
    for have in by_tier.values():
        for key, state in have.items():
            seen[state].add(key)
    usable = seen[Restored.INTACT] | seen[Restored.RELINKED]
    receipt.chunks_corrupt = len({chunk_of[key] for key in seen[Restored.CORRUPT]})
    receipt.chunks_relinked = len({chunk_of[key] for key in seen[Restored.RELINKED]})
    # What follows a lost chunk cannot be hit: LMCache matches from the front.
    receipt.chunks_found = min((chunk_of[key] for key in keys if key not in usable), default=window.chunk_count)
    return [ObjectKey.parse(key) for key in seen[Restored.CORRUPT]]


async def _forget(services: Services, keys: list[ObjectKey], receipt: Receipt) -> None:
    """Drop damaged objects from LMCache's memory too: it may have loaded them before we looked."""
    if services.cache is None:
        return
    try:
        await services.cache.delete(keys, tier="l1")
    except GatewayError as error:
        receipt.warnings.append(error.message)


async def _warm(
    services: Services,
    window: Window,
    model: Model,
    manifest: Manifest,
    warm: Warm,
    receipt: Receipt,
    progress: Progress,
) -> None:
    if services.cache is not None:
        try:
            await load(services, services.cache, window, manifest, receipt, progress)
        except GatewayError as error:
            receipt.warnings.append(error.message)
    if warm == "gpu":
        await _through_engine(services, window, model, manifest, receipt, progress)


async def load(
    services: Services, cache: LMCache, window: Window, manifest: Manifest, receipt: Receipt, progress: Progress
) -> None:
    """Load what was found from the tiers into LMCache's memory. Raises `cache_unavailable`."""
    ids = manifest.token_ids[: receipt.chunks_found * window.chunk_size]
    objects, _ = await cache.prefetch(
        window.model_root, window.world_size, manifest.id, ids, window.salt, services.settings.thaw_timeout_s, progress
    )
    receipt.chunks_prefetched = objects // window.world_size


async def _through_engine(
    services: Services, window: Window, model: Model, manifest: Manifest, receipt: Receipt, progress: Progress
) -> None:
    progress("prefill", 0, window.token_count)
    usage = await services.engines.for_lineage(window.lineage).prefill(model.id, manifest.token_ids, window.salt)
    receipt.cached_tokens, receipt.prompt_tokens = usage.cached, usage.prompt
    if usage.cached is None:
        receipt.warnings.append("the engine does not tell cached_tokens: start it with --enable-prompt-tokens-details")
    elif usage.cached < min(receipt.chunks_found * window.chunk_size, window.token_count - 1):
        receipt.warnings.append(
            f"the engine found {usage.cached} tokens of the {receipt.chunks_found} chunks in the tiers"
        )
    progress("prefill", window.token_count, window.token_count)


def object_names(window: Window, manifest: Manifest) -> list[ObjectKey]:
    """The KV objects that the window pinned, named anew from its token ids, in chunk order."""
    ids = manifest.token_ids[: window.chunk_count * window.chunk_size]
    if not ids:
        return []
    return object_keys(window.model_root, ids, window.chunk_size, window.world_size, window.salt)


def fresh_id(name: str, room: int = 0) -> str:
    """A session id after a window's name, with `room` left behind it."""
    suffix = f".{secrets.token_hex(4)}"
    return name[: MAX_NAME - len(suffix) - room] + suffix


def taken(session_id: str) -> GatewayError:
    """The error for a session id that is in use."""
    return GatewayError(
        "session_already_exists",
        f"there is a session {session_id!r} already",
        hint="choose another new_session_id, or none",
    )


def as_json(receipt: Receipt) -> Mapping[str, Any]:
    """The receipt as the admin API shows it."""
    return {name: getattr(receipt, name) for name in Receipt.__slots__ if name != "warnings"}
