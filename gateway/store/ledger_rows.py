"""The SQL of the ledger: what the engine did not have to compute, and what holding KV costs. The caller owns the
transaction.

Turns are booked many at once, from their rows, in the transaction that marks them as booked: that they are due is
recorded with them. Amounts are only ever added to, so workers cannot lose any of each other's. An amount in seconds is
booked by the curve as it was then (`gateway.store.prefill_curve`), and never changes: when an engine becomes quicker
or slower, a new curve begins. While a curve cannot tell, tokens wait until it can.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from gateway.records import Session, Usage
from gateway.store import prefill_curve, transcript_rows
from gateway.store.database import Db
from gateway.store.prefill_curve import PrefillCurve, Sample
from gateway.store.savings_rows import CURVE, Amount, curve_of, total
from gateway.store.types import Booking, LearnedCurve, Saved, TurnRecord

# Booking a turn writes two pages more, and recording one alone took a tenth longer for that. So turns wait until there
# are this many, or somebody reads the ledger. They are looked for among the last `_SEARCHED` turns: those that wait and
# those of a batch (`gateway.sessions.recorder`) are fewer.
_BOOKED_AT_ONCE, _SEARCHED = 256, 1024
# Learning takes as long as recording a turn: from so many samples on, only every so many are learned from at once.
_KNOWN_WELL, _LEARN_EVERY = 12, 4
_LOCK = ("ledger",)  # the last that a transaction locks
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


class _Entry(NamedTuple):
    """A request, and for whom it is booked: a name for each kind. Its first tokens may be `booked_before`."""

    item: Booking
    names: Mapping[str, str]
    booked_before: int = 0

    def amount(self, curve: PrefillCurve | None) -> Amount:
        """What it is booked with."""
        item, cached = self.item, self.item.cached_tokens
        before = min(self.booked_before, cached)
        tokens, squares = cached - before, cached * cached - before * before
        if curve is not None and cached <= curve.reach:
            return Amount(1, item.prompt_tokens, tokens, curve.saved(tokens, squares), 0, 0, 0, item.at)
        return Amount(1, item.prompt_tokens, tokens, 0.0, tokens, squares, cached if tokens else 0, item.at)


async def record(db: Db, records: Sequence[TurnRecord]) -> None:
    """Book turns that were recorded: the first ones of thawed sessions now, the others once there are enough."""
    first = [item for item in records if _is_first_since_thaw(item.session) and _is_counted(item)]
    if first:
        await book_turns(db)  # they are estimated by what those before have shown
        await _book(db, await _first_turns(db, first))
    last = await db.value("SELECT max(id) FROM turns") or 0
    if last % _BOOKED_AT_ONCE < len(records):
        await book_turns(db)


def is_booked_later(item: TurnRecord) -> bool:
    """Whether a turn is booked with others (`book_turns`). What is booked for a thaw, its first turn is not."""
    return _is_counted(item) and not _is_first_since_thaw(item.session)


async def has_unbooked(db: Db, until: int = 2**62) -> bool:
    """Whether turns wait to be booked, up to an id."""
    query = """SELECT EXISTS (
        SELECT 1 FROM turns WHERE id > (SELECT max(id) FROM turns) - ? AND id <= ? AND unbooked)"""
    return bool(await db.value(query, _SEARCHED, until))


async def book_turns(db: Db) -> None:
    """Book the turns that wait for it, each for its session."""
    await db.lock(_LOCK)
    rows = await db.all(
        """UPDATE turns SET unbooked = FALSE WHERE id > (SELECT max(id) FROM turns) - ? AND unbooked
        RETURNING id, tenant, 'turn', engine, fingerprint, model, prompt_tokens, cached_tokens, started_at, session_id,
            '', coalesce(first_token_ms, 0) / 1000""",
        _SEARCHED,
    )
    bookings = map(Booking._make, (row for _, *row in sorted(rows)))
    await _book(db, [_Entry(item, {"session": item.session_id}) for item in bookings])


async def _first_turns(db: Db, records: Sequence[TurnRecord]) -> list[_Entry]:
    """The turns of thawed sessions, the first of each for its window too, and without what the thaw has booked."""
    entries: dict[tuple[str, str], list[_Entry]] = {}
    for item in records:
        key = item.turn.tenant, item.turn.session_id
        names, before = {"session": item.turn.session_id}, 0
        if key not in entries:
            before = await _take_booked(db, *key) if item.session.rewinds else await _booked_by_thaw(db, *key)
            if await _is_of_window(db, item):
                names["window"] = item.session.window or ""
        entries.setdefault(key, []).append(_Entry(_of_turn(item), names, before))
    return list(chain.from_iterable(entries.values()))


async def _book(db: Db, entries: Iterable[_Entry]) -> None:
    """Learn from requests, and book them."""
    by_curve: dict[tuple[str, str], list[_Entry]] = {}
    for entry in entries:
        by_curve.setdefault((entry.item.engine, entry.item.fingerprint), []).append(entry)
    for group in by_curve.values():
        await _add(db, group, await _learned_from(db, [entry.item for entry in group]))


async def _add(db: Db, entries: Sequence[_Entry], learned: LearnedCurve) -> None:
    amounts: dict[tuple[str, str, str, int, str], Amount] = {}
    for entry in entries:
        amount = entry.amount(learned.curve)
        for kind, name in entry.names.items():
            account = entry.item.tenant, kind, name, learned.id, entry.item.source
            before = amounts.get(account)
            amounts[account] = before.plus(amount) if before else amount
    await db.many(_ADD, [account + amount for account, amount in amounts.items()])


def _is_counted(item: TurnRecord) -> bool:
    """Whether the engine has said what it found, and serves the turn's model."""
    turn = item.turn
    return bool(turn.usage and turn.usage.cached is not None and item.fingerprint and turn.engine)


def _of_turn(item: TurnRecord) -> Booking:
    """A turn that the engine has counted, as it is booked."""
    turn, usage = item.turn, item.turn.usage or Usage(0, 0, 0)
    return Booking(
        turn.tenant, "turn", turn.engine, item.fingerprint, turn.model, usage.prompt, usage.cached or 0,
        turn.started_at, first_token_s=(turn.first_token_ms or 0.0) / 1000,
    )  # fmt: skip


def _is_first_since_thaw(session: Session) -> bool:
    """Whether a turn found its session as a thaw has left it, a new one or one that was taken back."""
    return bool(session.window) and (session.state == "thawed" if session.rewinds else not session.turn_count)


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
    await book_turns(db)  # the estimate is by what they have shown
    entry, learned = _Entry(item, names), await _learned_from(db, [item])
    await _add(db, [entry], learned)
    if item.source == "thaw":
        await db.run(
            "UPDATE sessions SET booked_tokens = ? WHERE tenant = ? AND id = ?",
            item.cached_tokens,
            item.tenant,
            item.session_id,
        )
    return total([(entry.amount(learned.curve), learned)])


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


async def _learned_from(db: Db, items: Sequence[Booking]) -> LearnedCurve:
    """Learn from requests to one engine, for one model, and return its curve."""
    first = items[0]
    learned = await _current_curve(db, first.engine, first.fingerprint) or await _begin_like_others(db, first)
    samples = _samples(items, learned.curve)
    if not samples:
        return learned
    number = await _add_samples(db, learned.id, samples)
    if learned.samples >= _KNOWN_WELL and number % _LEARN_EVERY >= len(samples):
        return learned
    return await _learn(db, learned, max(item.at for item in items))


def _samples(items: Iterable[Booking], curve: PrefillCurve | None) -> list[Sample]:
    """What can be learned from. Of prompts of one size that ran together that is only the quickest."""
    found: dict[int, list[Sample]] = {}
    end: dict[int, float] = {}
    for item in sorted(items, key=lambda item: item.at):
        computed, cached = item.prompt_tokens - item.cached_tokens, item.cached_tokens
        if not (item.first_token_s and prefill_curve.is_cold(computed, cached)):
            continue
        sample = Sample(computed, cached, item.first_token_s, curve.seconds(computed, cached) if curve else None)
        same, busy_until = found.setdefault(sample.size_class, []), end.get(sample.size_class, -math.inf)
        if item.at >= busy_until:
            same.append(sample)
        elif sample.seconds / computed < same[-1].seconds / same[-1].computed:
            same[-1] = sample
        end[sample.size_class] = max(busy_until, item.at + item.first_token_s)
    return list(chain.from_iterable(found.values()))


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


async def _begin_like_others(db: Db, item: Booking) -> LearnedCurve:
    """Begin the curve of an engine that is new, with what is known of its model.

    Most often it is the same engine at another port. If it is quicker or slower, its first prompts will show it.
    """
    query = f"{CURVE} WHERE fingerprint = ? AND per_token IS NOT NULL ORDER BY id DESC LIMIT 1"
    row = await db.one(query, item.fingerprint)
    new = await _begin(db, item.engine, item.fingerprint, item.model, item.at)
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
        item.fingerprint,
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


async def _add_samples(db: Db, curve: int, samples: Sequence[Sample]) -> int:
    """Add samples; of each size only the last ones are kept. Returns the number of the last one."""
    await db.many(
        """INSERT INTO prefill_samples (curve, size_class, computed, cached, seconds, predicted)
        VALUES (?, ?, ?, ?, ?, ?)""",
        [(curve, sample.size_class, *sample) for sample in samples],
    )
    await db.many(
        """DELETE FROM prefill_samples WHERE curve = ?1 AND size_class = ?2 AND number <= (
            SELECT number FROM prefill_samples WHERE curve = ?1 AND size_class = ?2
            ORDER BY number DESC LIMIT 1 OFFSET ?3)""",
        [(curve, size_class, prefill_curve.KEPT_PER_CLASS) for size_class in {one.size_class for one in samples}],
    )
    return int(await db.value("SELECT max(number) FROM prefill_samples"))


async def _learn(db: Db, learned: LearnedCurve, at: float) -> LearnedCurve:
    """Fit a curve to its samples; where the last ones are of another engine, a new one that began `at`. Return it."""
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
    return await _set_curve(db, learned, samples)


async def _set_curve(db: Db, learned: LearnedCurve, samples: Sequence[Sample]) -> LearnedCurve:
    """Set a curve's coefficients, and book by them what has waited for that. A curve that is known stays so."""
    curve = prefill_curve.fit(samples) or learned.curve
    error = prefill_curve.error_share(samples)
    new = replace(learned, samples=len(samples), curve=curve, error_share=error)
    await _set_coefficients(db, new)
    if curve is None or (learned.curve and curve.reach <= learned.curve.reach):  # nothing within reach has waited
        return new
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
    return new
