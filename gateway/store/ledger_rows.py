"""The SQL of the ledger: what the engine did not have to compute, and what holding KV costs. The caller owns the
transaction.

Amounts are only ever added to, in the transaction that records the turn, so workers cannot lose any of each other's. An
amount in seconds is booked by the curve as it was then (`gateway.store.prefill_curve`), and never changes: when an
engine becomes quicker or slower, a new curve begins. While a curve cannot tell, tokens wait until it can.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gateway.records import Session
from gateway.store import prefill_curve, transcript_rows
from gateway.store.database import Db
from gateway.store.prefill_curve import PrefillCurve, Sample
from gateway.store.savings_rows import CURVE, Amount, curve_of, total
from gateway.store.types import Booking, LearnedCurve, Saved, TurnRecord

# Learning takes as long as recording a turn: from so many samples on, only every so many are learned from at once.
_KNOWN_WELL, _LEARN_EVERY = 12, 4
_CURVES_WITH_SAMPLES = 16  # of a model: a new curve begins at every port that an engine had
_ADD = """INSERT INTO savings (tenant, kind, name, curve, source, requests, prompt_tokens, tokens, seconds,
        unpriced_tokens, unpriced_squares, unpriced_longest, since) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (tenant, kind, name, curve, source) DO UPDATE SET
        requests = savings.requests + excluded.requests,
        prompt_tokens = savings.prompt_tokens + excluded.prompt_tokens,
        tokens = savings.tokens + excluded.tokens, seconds = savings.seconds + excluded.seconds,
        unpriced_tokens = savings.unpriced_tokens + excluded.unpriced_tokens,
        unpriced_squares = savings.unpriced_squares + excluded.unpriced_squares,
        unpriced_longest = CASE WHEN excluded.unpriced_longest > savings.unpriced_longest
            THEN excluded.unpriced_longest ELSE savings.unpriced_longest END"""


class _Account(NamedTuple):
    """What an amount is booked for."""

    tenant: str
    kind: str
    name: str
    curve: int
    source: str


def _amount(item: Booking, booked_before: int, curve: PrefillCurve | None) -> Amount:
    """What a request is booked with, but for the first tokens, which are booked already."""
    cached = item.cached_tokens
    before = min(booked_before, cached)
    tokens, squares = cached - before, cached * cached - before * before
    if curve is not None and cached <= curve.reach:
        return Amount(1, item.prompt_tokens, tokens, curve.saved(tokens, squares), 0, 0, 0, item.at)
    return Amount(1, item.prompt_tokens, tokens, 0.0, tokens, squares, cached if tokens else 0, item.at)


@dataclass(slots=True)
class _Entries:
    """What is booked in one transaction."""

    db: Db
    curves: dict[tuple[str, str], LearnedCurve] = field(default_factory=dict)
    amounts: dict[_Account, Amount] = field(default_factory=dict)
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)

    async def curve(self, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
        """The curve that is being learned for an engine and a model."""
        key = engine, fingerprint
        if key not in self.curves:
            current = await _current_curve(self.db, engine, fingerprint)
            self.curves[key] = current or await _begin_like_others(self.db, engine, fingerprint, model, at)
        return self.curves[key]

    async def book(self, item: Booking, names: Mapping[str, str], booked_before: int = 0) -> None:
        """Book a request for everybody in `names`, a name for each kind."""
        learned = await self.curve(item.engine, item.fingerprint, item.model, item.at)
        amount = _amount(item, booked_before, learned.curve)
        for kind, name in names.items():
            account = _Account(item.tenant, kind, name, learned.id, item.source)
            before = self.amounts.get(account)
            self.amounts[account] = before.plus(amount) if before else amount
        if item.first_token_s:
            self._sample(learned, item.prompt_tokens - item.cached_tokens, item.cached_tokens, item.first_token_s)

    def _sample(self, learned: LearnedCurve, computed: int, cached: int, seconds: float) -> None:
        """Take a sample. Turns of one batch ran together: only the quickest of each size is learned from."""
        if not prefill_curve.is_cold(computed, cached):
            return
        predicted = learned.curve.seconds(computed, cached) if learned.curve else None
        sample = Sample(computed, cached, seconds, predicted)
        key = learned.id, sample.size_class
        if key not in self.samples or seconds / computed < self.samples[key].seconds / self.samples[key].computed:
            self.samples[key] = sample

    async def write(self) -> None:
        """Write what was booked, and learn."""
        await self.db.many(_ADD, [(*account, *amount) for account, amount in self.amounts.items()])
        if self.samples:
            number = await _add_samples(self.db, self.samples)
            at = max(amount.since for amount in self.amounts.values())
            taken = {curve for curve, _ in self.samples}
            for learned in self.curves.values():
                if learned.id in taken and (learned.samples < _KNOWN_WELL or number % _LEARN_EVERY == 0):
                    await _learn(self.db, learned, at)


def lock_names(records: Iterable[TurnRecord]) -> Iterator[str]:
    """What `record` locks: the curves that it may learn."""
    return (f"curve {item.turn.engine} {item.fingerprint}" for item in records)


async def record(db: Db, records: Sequence[TurnRecord]) -> None:
    """Book turns, each for its session, and the first of a thawed session for its window too."""
    entries = _Entries(db)
    begun: set[tuple[str, str]] = set()  # sessions whose first turn is among these
    for item in records:
        booking = _of_turn(item)
        if booking is None:
            continue
        names, before = {"session": item.turn.session_id}, 0
        key = item.turn.tenant, item.turn.session_id
        if item.session.window and _is_first_since_thaw(item.session) and key not in begun:
            begun.add(key)
            before = await _take_booked(db, *key) if item.session.rewinds else await _booked_by_thaw(db, *key)
            if await _is_of_window(db, item):
                names["window"] = item.session.window
        await entries.book(booking, names, before)
    await entries.write()


def _of_turn(item: TurnRecord) -> Booking | None:
    """A turn as it is booked; None if the engine did not say what it found, or does not serve its model."""
    turn, usage = item.turn, item.turn.usage
    if usage is None or usage.cached is None or not item.fingerprint or not turn.engine:
        return None
    return Booking(
        turn.tenant, "turn", turn.engine, item.fingerprint, turn.model, usage.prompt, usage.cached, turn.started_at,
        first_token_s=(turn.first_token_ms or 0.0) / 1000,
    )  # fmt: skip


def _is_first_since_thaw(session: Session) -> bool:
    """Whether a turn found its session as a thaw has left it, a new one or one that was taken back."""
    return session.state == "thawed" if session.rewinds else not session.turn_count


async def _booked_by_thaw(db: Db, tenant: str, session_id: str) -> int:
    """Tokens that were booked when a session was thawed, if it has had no turn: that finds the same ones again."""
    rows = await db.all(
        "SELECT source, tokens FROM savings WHERE tenant = ? AND kind = 'session' AND name = ?", tenant, session_id
    )
    return 0 if any(source == "turn" for source, _ in rows) else sum(tokens for _, tokens in rows)


async def _take_booked(db: Db, tenant: str, session_id: str) -> int:
    """Tokens that were booked when a session was taken back, for its first turn after that."""
    key = tenant, session_id
    row = await db.one("SELECT booked_tokens FROM sessions WHERE tenant = ? AND id = ?", *key)
    if not row or not row[0]:
        return 0
    await db.run("UPDATE sessions SET booked_tokens = 0 WHERE tenant = ? AND id = ?", *key)
    return int(row[0])


async def _is_of_window(db: Db, item: TurnRecord) -> bool:
    """Whether the window that a session was thawed from is still there, and not another of its name."""
    session, beginning = item.session, item.session.window_transcript
    query = "SELECT transcript FROM windows WHERE tenant = ? AND name = ?"
    row = await db.one(query, session.tenant, session.window)
    return row is not None and beginning is not None and await transcript_rows.begins_with(db, row[0], beginning)


async def book(db: Db, item: Booking) -> Saved:
    """Book a thaw or an ask for its window and for its session, if there is one; return what it saved."""
    names = {"session": item.session_id} if item.session_id else {"rest": ""}
    there = "SELECT 1 FROM windows WHERE tenant = ? AND name = ?"
    if item.window and await db.one(there, item.tenant, item.window):
        names["window"] = item.window
    entries = _Entries(db)
    await entries.book(item, names)
    if item.source == "thaw":
        await db.run(
            "UPDATE sessions SET booked_tokens = ? WHERE tenant = ? AND id = ?",
            item.cached_tokens,
            item.tenant,
            item.session_id,
        )
    amount = next(iter(entries.amounts.values()))
    learned = await entries.curve(item.engine, item.fingerprint, item.model, item.at)
    await entries.write()
    return total([(amount, learned)])


async def forget_window(db: Db, tenant: str, name: str) -> None:
    """Delete what was booked for a window that is deleted: the sessions and asks have it too."""
    await db.run("DELETE FROM savings WHERE tenant = ? AND kind = 'window' AND name = ?", tenant, name)


async def forget_session(db: Db, tenant: str, session_id: str) -> None:
    """Book what was booked for a session that is deleted for the rest, so that it stays in the total."""
    query = f"SELECT curve, source, {', '.join(Amount._fields)} FROM savings WHERE tenant = ? AND kind = ? AND name = ?"
    rows = await db.all(query, tenant, "session", session_id)
    if rows:
        await db.many(_ADD, [(tenant, "rest", "", *row) for row in rows])
        await db.run("DELETE FROM savings WHERE tenant = ? AND kind = 'session' AND name = ?", tenant, session_id)


async def rename(db: Db, tenant: str, kind: str, name: str, new_name: str) -> None:
    """Book what was booked for a session or a window under its new name."""
    await db.run(
        """DELETE FROM savings WHERE tenant = ?1 AND kind = ?2 AND name = ?3 AND EXISTS (
            SELECT 1 FROM savings o WHERE o.tenant = ?1 AND o.kind = ?2 AND o.name = ?4
            AND o.curve = savings.curve AND o.source = savings.source)""",
        tenant, kind, new_name, name,
    )  # fmt: skip
    query = "UPDATE savings SET name = ? WHERE tenant = ? AND kind = ? AND name = ?"
    await db.run(query, new_name, tenant, kind, name)


# Learning.


async def _current_curve(db: Db, engine: str, fingerprint: str) -> LearnedCurve | None:
    query = f"{CURVE} WHERE engine = ? AND fingerprint = ? ORDER BY id DESC LIMIT 1"
    row = await db.one(query, engine, fingerprint)
    return curve_of(row) if row else None


async def _begin(db: Db, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
    identity = await db.value(
        "INSERT INTO prefill_curves (engine, fingerprint, model, began_at) VALUES (?, ?, ?, ?) RETURNING id",
        engine,
        fingerprint,
        model,
        at,
    )
    return LearnedCurve(identity, engine, fingerprint, model, at, 0, None, None)


async def _begin_like_others(db: Db, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
    """Begin the curve of an engine that is new, with what is known of its model.

    Most often it is the same engine at another port. If it is quicker or slower, its first prompts will show it.
    """
    query = f"{CURVE} WHERE fingerprint = ? AND per_token IS NOT NULL ORDER BY id DESC LIMIT 1"
    row = await db.one(query, fingerprint)
    new = await _begin(db, engine, fingerprint, model, at)
    if row is None:
        return new
    other = curve_of(row)
    await db.run(
        """INSERT INTO prefill_samples (curve, size_class, computed, cached, seconds, predicted)
        SELECT ?, size_class, computed, cached, seconds, predicted FROM prefill_samples WHERE curve = ?
        ORDER BY number""",
        new.id,
        other.id,
    )
    await _set_coefficients(db, replace(other, id=new.id))
    await db.run(
        """DELETE FROM prefill_samples WHERE curve IN (SELECT id FROM prefill_curves WHERE fingerprint = ?1)
        AND curve NOT IN (SELECT id FROM prefill_curves WHERE fingerprint = ?1 ORDER BY id DESC LIMIT ?2)""",
        fingerprint,
        _CURVES_WITH_SAMPLES,
    )
    return replace(new, samples=other.samples, curve=other.curve, error_share=other.error_share)


async def _set_coefficients(db: Db, learned: LearnedCurve) -> None:
    curve = learned.curve
    coefficients = (curve.reach, curve.per_request, curve.per_token, curve.per_pair) if curve else (0, None, None, None)
    await db.run(
        """UPDATE prefill_curves SET samples = ?, reach = ?, per_request = ?, per_token = ?, per_pair = ?,
        error_share = ? WHERE id = ?""",
        learned.samples,
        *coefficients,
        learned.error_share,
        learned.id,
    )


async def _add_samples(db: Db, samples: Mapping[tuple[int, int], Sample]) -> int:
    """Add samples; of each size only the last ones are kept. Returns the number of the last one."""
    await db.many(
        """INSERT INTO prefill_samples (curve, size_class, computed, cached, seconds, predicted)
        VALUES (?, ?, ?, ?, ?, ?)""",
        [(*key, *sample) for key, sample in samples.items()],
    )
    await db.many(
        """DELETE FROM prefill_samples WHERE curve = ?1 AND size_class = ?2 AND number <= (
            SELECT number FROM prefill_samples WHERE curve = ?1 AND size_class = ?2
            ORDER BY number DESC LIMIT 1 OFFSET ?3)""",
        [(*key, prefill_curve.KEPT_PER_CLASS) for key in samples],
    )
    return int(await db.value("SELECT max(number) FROM prefill_samples"))


async def _learn(db: Db, learned: LearnedCurve, at: float) -> None:
    """Fit a curve to its samples; where the last ones are of another engine, a new one that began `at`."""
    rows = await db.all(
        "SELECT number, computed, cached, seconds, predicted FROM prefill_samples WHERE curve = ? ORDER BY number",
        learned.id,
    )
    samples = [Sample(*row[1:]) for row in rows]
    if count := prefill_curve.since_change(samples):
        old, learned = learned, await _begin(db, learned.engine, learned.fingerprint, learned.model, at)
        samples = [sample._replace(predicted=None) for sample in samples[-count:]]
        await db.run(
            "UPDATE prefill_samples SET curve = ?, predicted = NULL WHERE curve = ? AND number >= ?",
            learned.id,
            old.id,
            rows[-count][0],
        )
        await db.run("DELETE FROM prefill_samples WHERE curve = ?", old.id)
    await _set_curve(db, learned, samples)


async def _set_curve(db: Db, learned: LearnedCurve, samples: Sequence[Sample]) -> None:
    """Set a curve's coefficients, and book by them what has waited for that. A curve that is known stays so."""
    curve = prefill_curve.fit(samples) or learned.curve
    error = prefill_curve.error_share(samples)
    await _set_coefficients(db, replace(learned, samples=len(samples), curve=curve, error_share=error))
    if curve is None:
        return
    await db.run(
        """UPDATE savings SET seconds = seconds + unpriced_tokens * CAST(? AS DOUBLE PRECISION)
            + unpriced_squares * CAST(? AS DOUBLE PRECISION) / 2.0,
        unpriced_tokens = 0, unpriced_squares = 0, unpriced_longest = 0
        WHERE curve = ? AND unpriced_tokens > 0 AND unpriced_longest <= ?""",
        curve.per_token,
        curve.per_pair,
        learned.id,
        curve.reach,
    )
