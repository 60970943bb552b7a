"""Turns that other workers see: locks that are taken with the first turn, dropped with the last, and with a death."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import GatewayError, StartError
from gateway.inflight import TurnLocks
from gateway.sessions import Sessions
from gateway.store.sqlite import SqliteStore
from tests.running import ROOT

HOLDER = """
import sys
from pathlib import Path
from gateway.inflight import TurnLocks
locks = TurnLocks(Path(sys.argv[1]))
locks.hold("session", "t", "s")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[tuple[TurnLocks, TurnLocks]]:
    """The locks of two workers."""
    ours, theirs = TurnLocks(tmp_path / "turns"), TurnLocks(tmp_path / "turns")
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_turn_is_seen_by_the_other_worker_and_not_by_its_own(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    ours.hold("session", "t", "s")
    assert theirs.elsewhere("session", "t", "s")
    assert theirs.any_elsewhere()
    assert not ours.elsewhere("session", "t", "s")
    assert not ours.any_elsewhere()
    for other in (("session", "t", "s2"), ("session", "t2", "s"), ("lineage", "t", "s"), ("session", "", "ts")):
        assert not theirs.elsewhere(*other)  # type: ignore[arg-type]
    ours.let_go("session", "t", "s")
    assert not theirs.elsewhere("session", "t", "s")
    assert not theirs.any_elsewhere()


def test_two_workers_may_be_in_a_turn_of_one_session(workers: tuple[TurnLocks, TurnLocks], tmp_path: Path) -> None:
    ours, theirs = workers
    third = TurnLocks(tmp_path / "turns")
    for locks in workers:
        locks.hold("session", "t", "s")
    ours.let_go("session", "t", "s")
    assert third.elsewhere("session", "t", "s")
    assert not theirs.elsewhere("session", "t", "s")
    theirs.let_go("session", "t", "s")
    assert not third.elsewhere("session", "t", "s")
    third.close()


def test_many_turns_do_not_disturb_each_other(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    for number in range(2000):
        ours.hold("session", "t", f"s{number}")
    for number in range(0, 2000, 2):
        ours.let_go("session", "t", f"s{number}")
    assert [theirs.elsewhere("session", "t", f"s{number}") for number in range(2000)] == [False, True] * 1000


def test_the_locks_of_a_worker_that_is_killed_are_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "turns")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        locks = TurnLocks(tmp_path / "turns")
        assert locks.elsewhere("session", "t", "s")
        holder.kill()
        holder.wait()
        assert not locks.elsewhere("session", "t", "s")
        locks.close()


def test_a_folder_that_cannot_be_had_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="set workers to 1"):
        TurnLocks(tmp_path / "file" / "turns")


@pytest.mark.anyio
async def test_the_first_turn_of_a_session_takes_the_lock_and_the_last_one_drops_it(
    workers: tuple[TurnLocks, TurnLocks], tmp_path: Path
) -> None:
    async with SqliteStore(tmp_path / "store.db", turns_kept=1) as store:
        here, there = Sessions(store, workers[0]), Sessions(store, workers[1])
        here.enter("t", "a", "l")
        here.enter("t", "a", "l")
        here.enter("t", "b", "l")
        assert await there.going_on("t", "l")
        here.leave("t", "a", "l")
        with pytest.raises(GatewayError) as busy:
            await there.at_rest("t", "a", 0.02)
        assert busy.value.code == "session_busy"
        here.leave("t", "a", "l")
        await there.at_rest("t", "a", 0.02)
        assert await there.going_on("t", "l")
        here.leave("t", "b", "l")
        assert not await there.going_on("t", "l")
        assert not workers[1].any_elsewhere()
        assert (here.alone, Sessions(store).alone) == (False, True)


@pytest.mark.anyio
async def test_waiting_for_the_record_of_others_is_bounded(
    workers: tuple[TurnLocks, TurnLocks], tmp_path: Path
) -> None:
    async with SqliteStore(tmp_path / "store.db", turns_kept=1) as store:
        here, there = Sessions(store, workers[0]), Sessions(store, workers[1])
        here.enter("t", "a", "a")
        await there.recorded_elsewhere("t", "a", 0.02)
        await there.recorded_elsewhere("", "", 0.02)
        await here.at_rest("t", "b", 0.02)
