"""Finished turns on their way to the store, without a gateway around them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.dialects.chat import ChatDialect
from gateway.errors import GatewayError
from gateway.records import Session
from gateway.sessions.active_turns import ActiveTurns
from gateway.sessions.cache_review import CacheReviewer
from gateway.sessions.prefix_chain import Prompt
from gateway.sessions.recorder import TurnRecorder
from gateway.sessions.session_match import SessionMatch
from gateway.sessions.token_estimator import Estimator
from gateway.sessions.turn_context import RelayResult, TurnContext
from gateway.store.sqlite import SqliteStore
from gateway.telemetry.metrics import Metrics, Stored
from gateway.telemetry.traces import Traces

pytestmark = pytest.mark.anyio
_ROOM = 8


class Desk:
    """Turns over a store of their own."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.telemetry = Metrics()
        reviews = CacheReviewer(store, Estimator(), lambda: 64)
        self.turns = TurnRecorder(store, ActiveTurns(store), reviews, self.telemetry, None, Traces(), max_pending=_ROOM)

    def finish(self, session_id: str) -> None:
        """Begin and end a turn of a session."""
        call = ChatDialect().read({"model": "demo", "messages": [{"role": "user", "content": "hi"}]}, b"")
        turn = TurnContext("t", ChatDialect(), call, None, Prompt(call.messages, b""), (), False, 0.0)
        turn.match = SessionMatch(Session("t", session_id, lineage=session_id), "", b"")
        self.turns.begin(turn)
        turn.result = RelayResult("engine_cut", 200)
        self.turns.enqueue(turn)

    @property
    def lost(self) -> float:
        """How many turns were lost."""
        rows = self.telemetry.rows(Stored({}, {}))
        return sum(row["value"] for row in rows if row["name"] == "cwg_turns_lost_total")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """Turns, with nothing recorded yet."""
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5) as store:
        yield Desk(store)


async def test_a_turn_that_cannot_be_recorded_costs_the_others_of_its_batch_nothing(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk.turns:
        for session_id in ("a", "\ud800", "b", "\ud801", "c"):  # SQLite takes no half of a surrogate pair
            desk.finish(session_id)
        await desk.turns.flush()
        assert [await desk.store.session("t", name) is not None for name in "abc"] == [True] * 3
    assert desk.lost == 2
    assert caplog.text.count("could not record a turn") == 1


async def test_past_its_room_no_turn_begins_until_some_are_recorded(desk: Desk) -> None:
    # Nobody takes them to the store yet.
    for number in range(_ROOM):
        desk.finish(f"s{number}")
    with pytest.raises(GatewayError) as refused:
        desk.finish("one more")
    assert refused.value.code == "rate_limited"
    assert "turn_queue" in refused.value.hint
    async with desk.turns:
        await desk.turns.flush()
        desk.finish("one more")
