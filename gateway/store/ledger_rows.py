"""The SQL of the ledger: what the engine did not have to compute, and what holding KV costs. The caller owns the
transaction.

Amounts are only ever added to, in the transaction that records the turn, so workers cannot lose any of each other's. An
amount in seconds is booked by the curve as it was then (`gateway.store.prefill_curve`), and never changes: when an
engine becomes quicker or slower, a new curve begins. While a curve cannot tell, tokens wait until it can.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gateway.records import Session
from gateway.store import prefill_curve, transcript_rows
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

    db: sqlite3.Connection
    curves: dict[tuple[str, str], LearnedCurve] = field(default_factory=dict)
    amounts: dict[_Account, Amount] = field(default_factory=dict)
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)

    def curve(self, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
        """The curve that is being learned for an engine and a model."""
        key = engine, fingerprint
        if key not in self.curves:
            current = _current_curve(self.db, engine, fingerprint)
            self.curves[key] = current or _begin_like_others(self.db, engine, fingerprint, model, at)
        return self.curves[key]

    def book(self, item: Booking, names: Mapping[str, str], booked_before: int = 0) -> None:
        """Book a request for everybody in `names`, a name for each kind."""
        learned = self.curve(item.engine, item.fingerprint, item.model, item.at)
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

    def write(self) -> None:
        """Write what was booked, and learn."""
        self.db.executemany(_ADD, [(*account, *amount) for account, amount in self.amounts.items()])
        if self.samples:
            number = _add_samples(self.db, self.samples)
            at = max(amount.since for amount in self.amounts.values())
            taken = {curve for curve, _ in self.samples}
            for learned in self.curves.values():
                if learned.id in taken and (learned.samples < _KNOWN_WELL or number % _LEARN_EVERY == 0):
                    _learn(self.db, learned, at)


def record(db: sqlite3.Connection, records: Sequence[TurnRecord]) -> None:
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
            before = _take_booked(db, *key) if item.session.rewinds else _booked_by_thaw(db, *key)
            if _is_of_window(db, item):
                names["window"] = item.session.window
        entries.book(booking, names, before)
    entries.write()


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


def _booked_by_thaw(db: sqlite3.Connection, tenant: str, session_id: str) -> int:
    """Tokens that were booked when a session was thawed, if it has had no turn: that finds the same ones again."""
    rows = db.execute(
        "SELECT source, tokens FROM savings WHERE tenant = ? AND kind = 'session' AND name = ?", (tenant, session_id)
    ).fetchall()
    return 0 if any(source == "turn" for source, _ in rows) else sum(tokens for _, tokens in rows)


def _take_booked(db: sqlite3.Connection, tenant: str, session_id: str) -> int:
    """Tokens that were booked when a session was taken back, for its first turn after that."""
    key = tenant, session_id
    row = db.execute("SELECT booked_tokens FROM sessions WHERE tenant = ? AND id = ?", key).fetchone()
    if not row or not row[0]:
        return 0
    db.execute("UPDATE sessions SET booked_tokens = 0 WHERE tenant = ? AND id = ?", key)
    return int(row[0])


def _is_of_window(db: sqlite3.Connection, item: TurnRecord) -> bool:
    """Whether the window that a session was thawed from is still there, and not another of its name."""
    session, beginning = item.session, item.session.window_transcript
    query = "SELECT transcript FROM windows WHERE tenant = ? AND name = ?"
    row = db.execute(query, (session.tenant, session.window)).fetchone()
    return row is not None and beginning is not None and transcript_rows.begins_with(db, row[0], beginning)


def book(db: sqlite3.Connection, item: Booking) -> Saved:
    """Book a thaw or an ask for its window and for its session, if there is one; return what it saved."""
    names = {"session": item.session_id} if item.session_id else {"rest": ""}
    there = "SELECT 1 FROM windows WHERE tenant = ? AND name = ?"
    if item.window and db.execute(there, (item.tenant, item.window)).fetchone():
        names["window"] = item.window
    entries = _Entries(db)
    entries.book(item, names)
    if item.source == "thaw":
        db.execute(
            "UPDATE sessions SET booked_tokens = ? WHERE tenant = ? AND id = ?",
            (item.cached_tokens, item.tenant, item.session_id),
        )
    amount = next(iter(entries.amounts.values()))
    learned = entries.curve(item.engine, item.fingerprint, item.model, item.at)
    entries.write()
    return total([(amount, learned)])


def forget_window(db: sqlite3.Connection, tenant: str, name: str) -> None:
    """Delete what was booked for a window that is deleted: the sessions and asks have it too."""
    db.execute("DELETE FROM savings WHERE tenant = ? AND kind = 'window' AND name = ?", (tenant, name))


def forget_session(db: sqlite3.Connection, tenant: str, session_id: str) -> None:
    """Book what was booked for a session that is deleted for the rest, so that it stays in the total."""
    query = f"SELECT curve, source, {', '.join(Amount._fields)} FROM savings WHERE tenant = ? AND kind = ? AND name = ?"
    rows = db.execute(query, (tenant, "session", session_id)).fetchall()
    if rows:
        db.executemany(_ADD, [(tenant, "rest", "", *row) for row in rows])
        db.execute("DELETE FROM savings WHERE tenant = ? AND kind = 'session' AND name = ?", (tenant, session_id))


def rename(db: sqlite3.Connection, tenant: str, kind: str, name: str, new_name: str) -> None:
    """Book what was booked for a session or a window under its new name."""
    query = "UPDATE OR REPLACE savings SET name = ? WHERE tenant = ? AND kind = ? AND name = ?"
    db.execute(query, (new_name, tenant, kind, name))


# Learning.


def _current_curve(db: sqlite3.Connection, engine: str, fingerprint: str) -> LearnedCurve | None:
    query = f"{CURVE} WHERE engine = ? AND fingerprint = ? ORDER BY id DESC LIMIT 1"
    row = db.execute(query, (engine, fingerprint)).fetchone()
    return curve_of(row) if row else None


def _begin(db: sqlite3.Connection, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
    cursor = db.execute(
        "INSERT INTO prefill_curves (engine, fingerprint, model, began_at) VALUES (?, ?, ?, ?) RETURNING id",
        (engine, fingerprint, model, at),
    )
    (identity,) = cursor.fetchone()
    return LearnedCurve(identity, engine, fingerprint, model, at, 0, None, None)


def _begin_like_others(db: sqlite3.Connection, engine: str, fingerprint: str, model: str, at: float) -> LearnedCurve:
    """Begin the curve of an engine that is new, with what is known of its model.

    Most often it is the same engine at another port. If it is quicker or slower, its first prompts will show it.
    """
    query = f"{CURVE} WHERE fingerprint = ? AND per_token IS NOT NULL ORDER BY id DESC LIMIT 1"
    row = db.execute(query, (fingerprint,)).fetchone()
    new = _begin(db, engine, fingerprint, model, at)
    if row is None:
        return new
    other = curve_of(row)
    db.execute(
        """INSERT INTO prefill_samples (curve, size_class, computed, cached, seconds, predicted)
        SELECT ?, size_class, computed, cached, seconds, predicted FROM prefill_samples WHERE curve = ?
        ORDER BY number""",
        (new.id, other.id),
    )
    _set_coefficients(db, replace(other, id=new.id))
    db.execute(
        """DELETE FROM prefill_samples WHERE curve IN (SELECT id FROM prefill_curves WHERE fingerprint = ?1)
        AND curve NOT IN (SELECT id FROM prefill_curves WHERE fingerprint = ?1 ORDER BY id DESC LIMIT ?2)""",
        (fingerprint, _CURVES_WITH_SAMPLES),
    )
    return replace(new, samples=other.samples, curve=other.curve, error_share=other.error_share)


def _set_coefficients(db: sqlite3.Connection, learned: LearnedCurve) -> None:
    curve = learned.curve
    coefficients = (curve.reach, curve.per_request, curve.per_token, curve.per_pair) if curve else (0, None, None, None)
    db.execute(
        """UPDATE prefill_curves SET samples = ?, reach = ?, per_request = ?, per_token = ?, per_pair = ?,
        error_share = ? WHERE id = ?""",
        (learned.samples, *coefficients, learned.error_share, learned.id),
    )


def _add_samples(db: sqlite3.Connection, samples: Mapping[tuple[int, int], Sample]) -> int:
    """Add samples; of each size only the last ones are kept. Returns the number of the last one."""
    db.executemany(
        """INSERT INTO prefill_samples (curve, size_class, computed, cached, seconds, predicted)
        VALUES (?, ?, ?, ?, ?, ?)""",
        [(*key, *sample) for key, sample in samples.items()],
    )
    db.executemany(
        """DELETE FROM prefill_samples WHERE curve = ?1 AND size_class = ?2 AND number <= (
            SELECT number FROM prefill_samples WHERE curve = ?1 AND size_class = ?2
            ORDER BY number DESC LIMIT 1 OFFSET ?3)""",
        [(*key, prefill_curve.KEPT_PER_CLASS) for key in samples],
    )
    (number,) = db.execute("SELECT max(number) FROM prefill_samples").fetchone()
    return int(number)


def _learn(db: sqlite3.Connection, learned: LearnedCurve, at: float) -> None:
    """Fit a curve to its samples; where the last ones are of another engine, a new one that began `at`."""
    rows = db.execute(
        "SELECT number, computed, cached, seconds, predicted FROM prefill_samples WHERE curve = ? ORDER BY number",
        (learned.id,),
    ).fetchall()
    samples = [Sample(*row[1:]) for row in rows]
    if count := prefill_curve.since_change(samples):
        old, learned = learned, _begin(db, learned.engine, learned.fingerprint, learned.model, at)
        samples = [sample._replace(predicted=None) for sample in samples[-count:]]
        db.execute(
            "UPDATE prefill_samples SET curve = ?, predicted = NULL WHERE curve = ? AND number >= ?",
            (learned.id, old.id, rows[-count][0]),
        )
        db.execute("DELETE FROM prefill_samples WHERE curve = ?", (old.id,))
    _set_curve(db, learned, samples)


def _set_curve(db: sqlite3.Connection, learned: LearnedCurve, samples: Sequence[Sample]) -> None:
    """Set a curve's coefficients, and book by them what has waited for that. A curve that is known stays so."""
    curve = prefill_curve.fit(samples) or learned.curve
    error = prefill_curve.error_share(samples)
    _set_coefficients(db, replace(learned, samples=len(samples), curve=curve, error_share=error))
    if curve is None:
        return
    db.execute(
        """UPDATE savings SET seconds = seconds + unpriced_tokens * ? + unpriced_squares * ? / 2.0,
        unpriced_tokens = 0, unpriced_squares = 0, unpriced_longest = 0
        WHERE curve = ? AND unpriced_tokens > 0 AND unpriced_longest <= ?""",
        (curve.per_token, curve.per_pair, learned.id, curve.reach),
    )
