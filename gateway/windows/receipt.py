"""A window with the receipt of its pinned KV, whether it was frozen here or imported."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.records import KvState, PinnedObject, Window


def with_receipt(
    window: Window, chunks: int, objects: Sequence[PinnedObject], clock: float, more: Mapping[str, Any]
) -> Window:
    """The window with what was pinned: `chunks` leading chunks of it, and a receipt of that, which has `more` as well.

    `clock` is when the verb began, of `time.monotonic`.
    """
    done = replace(
        window,
        chunk_count=chunks,
        size_bytes=sum({o.key: o.size for o in objects}.values()),
        kv=_state(chunks, window),
    )
    receipt = {
        "tokens": done.token_count,
        "chunks": done.chunk_count,
        "chunk_size": done.chunk_size,
        "tail_tokens": done.tail_tokens,
        "bytes": done.size_bytes,
        "tiers": _tiers(objects),
        "kv": done.kv,
        **more,
        "duration_ms": round((time.monotonic() - clock) * 1000, 1),
    }
    return replace(done, receipt=receipt)


def whole_chunks(window: Window) -> int:
    """Whole chunks that the window's tokens have, kept or not."""
    return window.token_count // window.chunk_size if window.chunk_size else 0


def _state(chunks: int, window: Window) -> KvState:
    if not chunks:
        return "absent"
    return "complete" if chunks == whole_chunks(window) else "partial"


def _tiers(objects: Sequence[PinnedObject]) -> dict[str, dict[str, int]]:
    tiers: dict[str, dict[str, int]] = {}
    for one in objects:
        tier = tiers.setdefault(one.tier, {"objects": 0, "bytes": 0})
        tier["objects"] += 1
        tier["bytes"] += one.size
    return tiers
