"""The SQL that reads the ledger, and adds up what holding KV costs. The caller owns the transaction."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from gateway.store.database import Db
from gateway.store.prefill_curve import MIN_SAMPLES, PrefillCurve
from gateway.store.sql import batches, marks
from gateway.store.types import HeldKv, LearnedCurve, Saved, Source

Kind = Literal["session", "window"]
_CURVE_COLUMNS = (
    "id", "engine", "fingerprint", "model", "began_at", "samples", "reach", "per_request", "per_token", "per_pair",
    "error_share",
)  # fmt: skip
CURVE = f"SELECT {', '.join(_CURVE_COLUMNS)} FROM prefill_curves"


class Amount(NamedTuple):
    """What an account of the ledger has, or is added to it, in the order of its columns."""

    requests: int
    prompt_tokens: int
    tokens: int
    seconds: float
    unpriced_tokens: int
    unpriced_squares: int
    unpriced_longest: int
    since: float

    def plus(self, other: "Amount") -> "Amount":
        """The sum of two, since the first."""
        return Amount(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.unpriced_tokens + other.unpriced_tokens,
            self.unpriced_squares + other.unpriced_squares,
            max(self.unpriced_longest, other.unpriced_longest),
            self.since,
        )


_NOTHING = Amount(0, 0, 0, 0.0, 0, 0, 0, 0.0)
_AMOUNTS = Amount._fields
_SAVINGS = f"""SELECT {", ".join(f"s.{name}" for name in _AMOUNTS)}, {", ".join(f"c.{name}" for name in _CURVE_COLUMNS)}
    FROM savings s JOIN prefill_curves c ON c.id = s.curve WHERE s.tenant = ? AND s.kind = ?"""
Entry = tuple[Amount, LearnedCurve]
# A request is booked for its session, or for the rest if it has none. What windows have is a part of that.
_EVERYTHING = "kind IN ('session', 'rest')"
_SUMS = dict.fromkeys(_AMOUNTS, "CAST(sum({}) AS BIGINT)") | {
    "seconds": "sum({})", "unpriced_longest": "max({})", "since": "min({})"
}  # fmt: skip


def curve_of(row: Sequence[Any]) -> LearnedCurve:
    """A row of `CURVE`."""
    identity, engine, fingerprint, model, began_at, samples, reach, per_request, per_token, per_pair, error = row
    curve = None if per_token is None else PrefillCurve(per_request, per_token, per_pair, reach)
    return LearnedCurve(identity, engine, fingerprint, model, began_at, samples, curve, error)


def total(entries: Iterable[Entry]) -> Saved:
    """What entries add up to."""
    amounts, waiting, weighed, tokens_weighed = _NOTHING, "", 0.0, 0
    for amount, learned in entries:
        amounts = amounts.plus(amount)
        if amount.unpriced_tokens:
            waiting = why_unknown(learned)
        if learned.error_share is not None:
            weighed += amount.tokens * learned.error_share
            tokens_weighed += amount.tokens
    estimated = amounts.tokens - amounts.unpriced_tokens
    return Saved(
        requests=amounts.requests,
        prompt_tokens=amounts.prompt_tokens,
        tokens=amounts.tokens,
        seconds_estimated=round(amounts.seconds, 3) if amounts.requests and (estimated or not amounts.tokens) else None,
        tokens_estimated=estimated,
        error_share=round(weighed / tokens_weighed, 3) if tokens_weighed else None,
        reason=waiting or (None if amounts.requests else "no request yet whose cached tokens the engine counted"),
    )


def why_unknown(learned: LearnedCurve) -> str:
    """Why a curve does not say how long some tokens would have taken."""
    if learned.curve is None:
        return (
            f"learned from prompts that {learned.engine} computes without the cache: "
            f"{learned.samples} so far, {MIN_SAMPLES} are needed"
        )
    return f"estimates reach to {learned.curve.reach} tokens, until {learned.engine} has computed longer prompts"


async def saved(db: Db, tenant: str, kind: Kind, names: Sequence[str]) -> dict[str, Saved]:
    """Return what was saved by each of these sessions or windows."""
    entries: dict[str, list[Entry]] = {}
    for batch in batches(names):
        query = f"{_SAVINGS.replace('SELECT', 'SELECT s.name,', 1)} AND s.name IN ({marks(batch)})"
        for name, *row in await db.all(query, tenant, kind, *batch):
            entries.setdefault(name, []).append(_entry(row))
    nothing = total(())  # of most
    return {name: total(entries[name]) if name in entries else nothing for name in names}


def _entry(row: Sequence[Any]) -> Entry:
    return Amount(*row[: len(_AMOUNTS)]), curve_of(row[len(_AMOUNTS) :])


async def saved_by_source(db: Db, tenant: str) -> dict[str, Saved]:
    """Return what was saved by each source, and by `all` of them."""
    sums = ", ".join(f"{how.format(name)} AS {name}" for name, how in _SUMS.items())
    curves = {one.id: one for one in await prefill_curves(db)}
    rows = await db.all(
        f"SELECT source, curve, {sums} FROM savings WHERE tenant = ? AND {_EVERYTHING} GROUP BY source, curve", tenant
    )
    found = [(source, (Amount(*row), curves[curve])) for source, curve, *row in rows]
    by_source = {one: total(entry for source, entry in found if source == one) for one in get_args(Source)}
    return {"all": total(entry for _, entry in found), **by_source}


async def saved_since(db: Db, tenant: str) -> float | None:
    """Return when the first request of a tenant was booked."""
    (since,) = await db.one(f"SELECT min(since) FROM savings WHERE tenant = ? AND {_EVERYTHING}", tenant)
    return None if since is None else float(since)


async def most_saved(db: Db, tenant: str, kind: Kind, limit: int) -> dict[str, Saved]:
    """Return the sessions or windows that have saved most tokens, the first most."""
    rows = await db.all(
        """SELECT name FROM savings WHERE tenant = ? AND kind = ? GROUP BY name HAVING sum(tokens) > 0
        ORDER BY sum(tokens) DESC, name LIMIT ?""",
        tenant,
        kind,
        limit,
    )
    return await saved(db, tenant, kind, [name for (name,) in rows])


async def prefill_curves(db: Db) -> list[LearnedCurve]:
    """Return all curves, newest first."""
    return [curve_of(row) for row in await db.all(f"{CURVE} ORDER BY id DESC")]


async def saved_by_tenants(db: Db) -> dict[str, tuple[int, float]]:
    """Return tokens and seconds saved by all tenants, by source."""
    rows = await db.all(
        f"SELECT source, CAST(sum(tokens) AS BIGINT), sum(seconds) FROM savings WHERE {_EVERYTHING} GROUP BY source"
    )
    none: dict[str, tuple[int, float]] = dict.fromkeys(get_args(Source), (0, 0.0))
    return none | {source: (tokens, seconds) for source, tokens, seconds in rows}


async def hold(db: Db, size: int, now: float, elapsed_s: float | None) -> None:
    """Add up the bytes that windows have held for `elapsed_s`, and set what they hold now.

    Without `elapsed_s` by the clock, as long as that has not gone back.
    """
    before = await held_kv(db)
    if before is None:
        await db.run("INSERT INTO held_kv (id, bytes, byte_hours, since, at) VALUES (1, ?, 0, ?, ?)", size, now, now)
        return
    elapsed_s = max(0.0, now - before.at) if elapsed_s is None else elapsed_s
    await db.run(
        "UPDATE held_kv SET bytes = ?, byte_hours = byte_hours + ?, at = ?", size, before.bytes * elapsed_s / 3600, now
    )


async def held_kv(db: Db) -> HeldKv | None:
    """Return what windows hold, and have held; None if it was not added up yet."""
    row = await db.one("SELECT bytes, byte_hours, since, at FROM held_kv")
    return HeldKv(*row) if row else None
