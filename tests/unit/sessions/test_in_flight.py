"""Turns that other workers see: locks that are taken with the first turn, dropped with the last, and with a death."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StartError
from gateway.sessions.in_flight import LockKey, TurnLocks
from tests.support.gateway_process import ROOT

HOLDER = """
import sys
from pathlib import Path
from gateway.sessions.in_flight import TurnLocks
locks = TurnLocks(Path(sys.argv[1]))
locks.acquire([("session", "t", "s")])
print("held", flush=True)
sys.stdin.read()
"""

OVER = HOLDER.replace('locks.acquire([("session", "t", "s")])', "[locks.mark_ended(batch) for batch in (1, 2, 9)]")
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[tuple[TurnLocks, TurnLocks]]:
    """The locks of two workers."""
    ours, theirs = TurnLocks(tmp_path / "turns"), TurnLocks(tmp_path / "turns")
    yield ours, theirs
    ours.close()
    theirs.close()


def test_a_turn_is_seen_by_the_other_worker_and_not_by_its_own(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    ours.acquire([("session", "t", "s")])
    assert theirs.held_elsewhere(("session", "t", "s"))
    assert not ours.held_elsewhere(("session", "t", "s"))
    others: list[LockKey] = [
        ("session", "t", "s2"),
        ("session", "t2", "s"),
        ("lineage", "t", "s"),
        ("session", "", "ts"),
    ]
    assert not any(theirs.held_elsewhere(other) for other in others)
    ours.release([("session", "t", "s")])
    assert not theirs.held_elsewhere(("session", "t", "s"))


def test_two_workers_may_be_in_a_turn_of_one_session(workers: tuple[TurnLocks, TurnLocks], tmp_path: Path) -> None:
    ours, theirs = workers
    third = TurnLocks(tmp_path / "turns")
    for locks in workers:
        locks.acquire([("session", "t", "s")])
    ours.release([("session", "t", "s")])
    assert third.held_elsewhere(("session", "t", "s"))
    assert not theirs.held_elsewhere(("session", "t", "s"))
    theirs.release([("session", "t", "s")])
    assert not third.held_elsewhere(("session", "t", "s"))
    third.close()


def test_the_first_turn_takes_the_lock_and_the_last_one_drops_it(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    for _ in range(3):
        ours.acquire([("session", "t", "s")])
    for _ in range(2):
        ours.release([("session", "t", "s")])
    assert theirs.held_elsewhere(("session", "t", "s"))
    ours.release([("session", "t", "s")])
    assert not theirs.held_elsewhere(("session", "t", "s"))


def test_finished_turns_are_reported_in_batches(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    for batch in range(5):
        ours.mark_ended(batch)
    assert ours.ended_elsewhere() == set()
    assert len(first := theirs.ended_elsewhere()) == 5
    for batch in (0, 1, 3):
        ours.mark_recorded(batch)
    ours.mark_ended(5)
    left = theirs.ended_elsewhere()
    assert (len(left), len(left & first)) == (3, 2)
    for batch in (2, 4, 5):
        ours.mark_recorded(batch)
    assert theirs.ended_elsewhere() == set()


def test_finished_turns_of_every_worker_are_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OVER, str(tmp_path / "turns")]
    locks = TurnLocks(tmp_path / "turns")
    with ExitStack() as stack:
        others = [stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **PIPES)) for _ in range(4)]
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
        assert len(locks.ended_elsewhere()) == 4 * 3
        others[1].kill()
        others[1].wait()
        assert len(locks.ended_elsewhere()) == 3 * 3
        for other in others:
            other.kill()
    locks.close()


def test_many_turns_do_not_disturb_each_other(workers: tuple[TurnLocks, TurnLocks]) -> None:
    ours, theirs = workers
    for number in range(2000):
        ours.acquire([("session", "t", f"s{number}")])
    for number in range(0, 2000, 2):
        ours.release([("session", "t", f"s{number}")])
    assert [theirs.held_elsewhere(("session", "t", f"s{number}")) for number in range(2000)] == [False, True] * 1000


def test_the_locks_of_a_worker_that_is_killed_are_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "turns")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        locks = TurnLocks(tmp_path / "turns")
        assert locks.held_elsewhere(("session", "t", "s"))
        holder.kill()
        holder.wait()
        assert not locks.held_elsewhere(("session", "t", "s"))
        locks.close()


def test_a_folder_that_cannot_be_created_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="set workers to 1"):
        TurnLocks(tmp_path / "file" / "turns")
