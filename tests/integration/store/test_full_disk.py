"""A disk that is full, or refuses writes: turns that were answered are recorded, and deleting works."""

import os
import resource
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from gateway.store.ballast import PART_BYTES, Ballast, Reserve
from gateway.store.failures import write_failure
from gateway.store.types import StoreUnavailable
from gateway.store.writer import Writer
from gateway.windows.archive.spool import Spool
from tests.integration.api.test_server import DEAD, assert_one_clear_line, serve
from tests.integration.test_metrics import numbers, value
from tests.support.admin_requests import error_of
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, eventually, free_port, gateway_in_front_of

pytestmark = pytest.mark.sqlite

_DISK_MIB = 48
_SMALL_FILE = 128 * 1024
_TEXT = "All of this has to be kept. " * 700  # some 20 KB


@contextmanager
def refused_writes(gateway: Gateway) -> Iterator[None]:
    """Limit the gateway's files to 64 KiB, so that its store fails."""
    _, hard = resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE)
    wal = gateway.data_dir / "gateway.db-wal"
    assert wal.stat().st_size > 2 * 65536
    resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, (65536, hard))
    try:
        yield
    finally:
        resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


def lost(gateway: Gateway) -> float:
    """How many turns were lost."""
    return value(numbers(gateway.http.get("/metrics").text), "cwg_turns_lost_total")


def test_turns_queue_while_the_store_cannot_be_written(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for number in range(20):
            assert gateway.chat(f"{session}-{number}", _TEXT).status_code == 200
        gateway.turns(f"{session}-19")
        with refused_writes(gateway):
            answered = 0
            while (response := gateway.chat(session)).status_code == 200:
                answered += 1
            assert answered >= 1
            assert response.status_code == 507
            assert response.json()["error"]["code"] == "storage_full"
            assert "could not be recorded" in response.json()["error"]["message"]
            assert "ulimit -f" in response.json()["error"]["message"]
            ready = gateway.http.get("/readyz")
            assert (ready.status_code, ready.json()["waiting_for"]) == (503, "store")
            assert "cannot be written" in ready.json()["reason"]
            health = gateway.http.get("/admin/health?component=store").json()
            assert health["components"]["store"]["status"] == "unhealthy"
            assert gateway.http.get("/admin/sessions").status_code == 200  # nobody waits for the record
        eventually(lambda: gateway.http.get("/readyz").status_code == 200, "ready again", more=lambda: gateway.log)
        assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == answered
        assert gateway.chat(session).status_code == 200
        assert lost(gateway) == 0
        assert gateway.log.count("turns cannot be recorded") == 1
        assert "Traceback" not in gateway.log


def test_queued_turns_are_recorded_at_shutdown(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for number in range(20):
            gateway.chat(f"{session}-{number}", _TEXT)
        gateway.turns(f"{session}-19")
        with refused_writes(gateway):
            while gateway.chat(session).status_code == 200:
                pass
            gateway.process.terminate()
            eventually(lambda: not accepts(gateway), "it takes no more connections")
        assert gateway.process.wait(20) == 0
        gateway.start().wait()
        assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] >= 1


def accepts(gateway: Gateway) -> bool:
    """Whether it takes connections."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", gateway.port)) == 0


# --- what is set aside


def test_ballast_is_allocated_released_once_and_restored(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "x.db")
    assert not ballast.is_complete
    assert not ballast.release(Reserve.TURNS)
    ballast.restore()
    assert ballast.is_complete
    files = sorted(tmp_path.iterdir())
    assert [file.stat().st_blocks * 512 >= PART_BYTES for file in files] == [True, True]
    assert ballast.release(Reserve.DELETIONS)
    assert not ballast.release(Reserve.DELETIONS)
    assert [file.exists() for file in files] == [True, False]
    ballast.restore()
    assert ballast.is_complete


# --- a small disk of its own


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `_DISK_MIB`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={_DISK_MIB}m"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs a file system of its own: run as root, in a container with CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk completely."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    assert os.statvfs(disk).f_bavail == 0
    return filler


def test_full_disk_loses_no_turn_and_allows_deletions(engine: FakeEngine, disk: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, disk) as gateway:
        for number in range(3):
            assert gateway.chat(f"old-{number}", _TEXT).status_code == 200
            assert gateway.freeze(f"old-{number}", f"w-{number}").status_code == 201
        filler = fill(disk)
        answered = 0
        while (response := gateway.chat(f"{session}-{answered}", f"{answered} {_TEXT}")).status_code == 200:
            answered += 1
            assert answered < 2000
        assert error_of_turn(response) == (507, "storage_full")
        assert answered > 20  # what was set aside for them
        ready = gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["waiting_for"]) == (503, "store")
        assert "disk is full" in ready.json()["reason"]
        assert error_of(gateway.freeze("old-0", "another")) == (507, "storage_full")
        assert gateway.http.delete("/admin/windows/w-0").status_code == 200
        assert gateway.http.delete("/admin/sessions/old-0").status_code == 200
        filler.unlink()
        eventually(lambda: gateway.http.get("/readyz").status_code == 200, "ready again", more=lambda: gateway.log)
        for number in range(answered):
            assert gateway.http.get(f"/admin/sessions/{session}-{number}").json()["turn_count"] == 1
        assert gateway.chat(session).status_code == 200
        assert lost(gateway) == 0
        assert gateway.http.get("/admin/windows/w-1/messages").json()["messages"]
        ballast = Ballast(gateway.data_dir / "gateway.db")
        eventually(lambda: ballast.is_complete, "space is set aside again", 30)


def error_of_turn(response: object) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    return response.status_code, response.json()["error"]["code"]  # type: ignore[attr-defined]


def test_gateway_starts_on_a_full_disk_and_can_delete(engine: FakeEngine, disk: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, disk) as gateway:
        gateway.chat(session, _TEXT)
        assert gateway.freeze(session, "w").status_code == 201
        gateway.process.kill()
        gateway.process.wait()
        fill(disk)
        for _ in range(2):  # a second start finds less that was set aside
            gateway.start().wait("/healthz")
            assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 1
            assert gateway.stop() == 0
            assert "Traceback" not in gateway.log
        gateway.start().wait("/healthz")
        assert gateway.http.delete("/admin/windows/w").status_code == 200


def test_start_on_a_full_disk_without_reserve_names_the_remedy(disk: Path) -> None:
    fill(disk)
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=disk / "data")
    assert_one_clear_line(ended, "gateway.db", "full", "free 8 MiB")


# --- what refuses, where SQLite does not say


def broken_write() -> sqlite3.OperationalError:
    """SQLite's error for any write that the system refuses, except on a full disk."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    return error


@pytest.mark.anyio
async def test_faulty_disk_is_not_reported_as_full(tmp_path: Path) -> None:
    async def fail(_: object) -> None:
        raise broken_write()

    store = tmp_path / "x.db"
    store.touch()
    writer = Writer(store, lambda: sqlite3.connect(":memory:", isolation_level=None), Ballast(store))
    writer.start()
    with pytest.raises(
        StoreUnavailable, match=r"x\.db cannot be written: Input/output error; is its disk faulty"
    ) as told:
        await writer.write(fail)
    await writer.stop()
    assert told.value.code == "internal"


def test_quota_or_limit_is_distinguished_from_a_faulty_disk(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(bytes(_SMALL_FILE - 4096))
    with small_files():
        told = write_failure(tmp_path / "x.db", broken_write(), full=False)
    assert isinstance(told, StoreUnavailable)
    assert (told.code, "ulimit -f" in told.message) == ("storage_full", True)


@contextmanager
def small_files() -> Iterator[None]:
    """Limit this process's files to 128 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL_FILE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.anyio
@pytest.mark.parametrize("over", [100, 2**20])
async def test_limit_on_file_size_is_reported_for_an_import_too(tmp_path: Path, over: int) -> None:
    async def spool() -> None:
        async with Spool(tmp_path, 1) as file:
            for _ in range(_SMALL_FILE // 4096):
                await file.write(memoryview(bytes(4096)))
            await file.write(memoryview(bytes(over)))
            await file.rewind()

    with small_files(), pytest.raises(GatewayError, match="File too large") as told:
        await spool()
    assert told.value.code == "storage_full"
