"""The lock between the processes of a machine."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.kv.file_lock import FileLock
from tests.support.gateway_process import ROOT

pytestmark = pytest.mark.anyio

# Takes the lock, says so, and holds it until its standard input ends.
HOLDER = """
import asyncio, sys
from pathlib import Path
from gateway.kv.file_lock import FileLock
async def hold():
    async with FileLock(Path(sys.argv[1])).acquire(exclusive=sys.argv[2] == "alone"):
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(hold())
"""


@contextmanager
def holder(path: Path, how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that acquires the lock."""
    argv = [sys.executable, "-c", HOLDER, str(path), how]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def wait_held(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process holds the lock."""
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"


def open_files() -> int:
    """How many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def taken(path: Path, *, alone: bool, within: float) -> bool:
    """Whether this process gets the lock within `within` seconds."""
    try:
        async with asyncio.timeout(within), FileLock(path).acquire(exclusive=alone):
            return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("theirs", "alone", "both"),
    [("shared", False, True), ("shared", True, False), ("alone", False, False), ("alone", True, False)],
)
async def test_lock_is_shared_or_exclusive_across_processes(
    tmp_path: Path, theirs: str, alone: bool, both: bool
) -> None:
    path = tmp_path / "lock"
    with holder(path, theirs) as other:
        wait_held(other)
        assert await taken(path, alone=alone, within=5 if both else 0.2) is both
        other.communicate()  # its input ends, and so does it
        assert await taken(path, alone=alone, within=5)


@pytest.mark.parametrize("theirs", ["shared", "alone"])
async def test_lock_of_killed_process_is_free(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / "lock"
    with holder(path, theirs) as other:
        wait_held(other)
        waiting = asyncio.create_task(taken(path, alone=True, within=10))
        assert not await taken(path, alone=True, within=0.1)
        other.kill()
        assert await waiting


async def test_exclusive_lock_waits_for_the_last_reader(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path, "shared") as one, holder(path, "shared") as other:
        wait_held(one)
        wait_held(other)
        waiting = asyncio.create_task(taken(path, alone=True, within=10))
        one.communicate()
        assert not await taken(path, alone=True, within=0.1)
        other.communicate()
        assert await waiting


async def test_tasks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    inside = most = 0

    async def work(alone: bool) -> None:
        nonlocal inside, most
        async with lock.acquire(exclusive=alone):
            inside += 1
            most = max(most, inside)
            assert inside == 1 or not alone
            for _ in range(3):
                await asyncio.sleep(0)
            inside -= 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(work(alone=True) for _ in range(5)))
        assert most == 1
        await asyncio.gather(*(work(alone=False) for _ in range(5)))
        assert most == 5


async def test_cancelled_wait_leaks_no_file(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    async with lock.acquire(exclusive=True):
        before = open_files()
        for _ in range(5):
            assert not await taken(tmp_path / "lock", alone=False, within=0.01)
        assert open_files() == before
    assert await taken(tmp_path / "lock", alone=True, within=5)


@pytest.mark.parametrize("end", [ValueError, asyncio.CancelledError])
async def test_failure_inside_releases_the_lock(tmp_path: Path, end: Callable[[], BaseException]) -> None:
    with pytest.raises((ValueError, asyncio.CancelledError)):
        async with FileLock(tmp_path / "lock").acquire(exclusive=True):
            raise end()
    assert await taken(tmp_path / "lock", alone=True, within=5)


async def test_lock_file_is_private(tmp_path: Path) -> None:
    async with FileLock(tmp_path / "lock").acquire(exclusive=True):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
