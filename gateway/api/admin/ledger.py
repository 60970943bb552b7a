"""GET /admin/ledger: what the cache has saved, what holding KV costs, and how the estimates were learned."""

from collections.abc import Container, Sequence

from gateway.api.admin import serializers
from gateway.api.admin.models import ledger as models
from gateway.api.admin.models import requests
from gateway.api.endpoint import Call
from gateway.api.operation import operation
from gateway.store.savings_rows import why_unknown
from gateway.store.types import HeldKv, LearnedCurve

_LENGTHS = (1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000)
_HOUR_S = 3600
_MOST_CURVES = 50  # an engine begins one at each of its ports


@operation("GET", "/admin/ledger")
async def ledger(call: Call, query: requests.LedgerQuery) -> models.Ledger:
    """What the engine did not have to compute, how long that would have taken, and what holding KV costs."""
    await call.services.recorder.flush()
    store, tenant = call.services.store, call.tenant
    by_source = {source: serializers.saved(one) for source, one in (await store.saved_by_source(tenant)).items()}
    sessions = await store.most_saved(tenant, "session", query.limit)
    return models.Ledger(
        total=by_source["all"],
        turns=by_source["turn"],
        thaws=by_source["thaw"],
        asks=by_source["ask"],
        since=serializers.moment_or_null(await store.saved_since(tenant)),
        windows=await _windows(call, query.limit),
        sessions=[models.SessionSaved(id=name, saved=serializers.saved(one)) for name, one in sessions.items()],
        held=_held(await store.held_kv()),
        curves=_curves(await store.prefill_curves(), {member.url for member in call.services.engines.members}),
    )


async def _windows(call: Call, limit: int) -> list[models.WindowSaved]:
    store, lines = call.services.store, []
    for name, saved in (await store.most_saved(call.tenant, "window", limit)).items():
        window = await store.window(call.tenant, name)
        if window is None:  # deleted just now
            continue
        hours = max(0.0, call.now - window.created_at) / _HOUR_S
        size = window.size_bytes
        line = models.WindowSaved(
            name=name, size_bytes=size, byte_hours=round(size * hours, 1), saved=serializers.saved(saved)
        )
        lines.append(line)
    return lines


def _held(held: HeldKv | None) -> models.Held:
    if held is None:
        return models.Held(bytes=0, byte_hours=0, since=None)
    return models.Held(bytes=held.bytes, byte_hours=round(held.byte_hours, 1), since=serializers.moment(held.since))


def _curves(curves: Sequence[LearnedCurve], engines: Container[str]) -> list[models.Curve]:
    """Curves, newest first: the first of an engine and a model is the current one, if the engine is still here."""
    seen: set[tuple[str, str]] = set()
    shown = []
    for one in curves[:_MOST_CURVES]:
        shown.append(_curve(one, current=one.engine in engines and (one.engine, one.fingerprint) not in seen))
        seen.add((one.engine, one.fingerprint))
    return shown


def _curve(learned: LearnedCurve, *, current: bool) -> models.Curve:
    curve = learned.curve
    lengths = [length for length in _LENGTHS if curve and length <= curve.reach]
    return models.Curve(
        engine=learned.engine,
        model=learned.model,
        fingerprint=learned.fingerprint,
        began_at=serializers.moment(learned.began_at),
        current=current,
        samples=learned.samples,
        tokens_reach=curve.reach if curve else None,
        seconds_by_tokens={str(length): round(curve.seconds(length), 3) for length in lengths} if curve else {},
        error_share=learned.error_share,
        reason=None if curve else why_unknown(learned),
    )
