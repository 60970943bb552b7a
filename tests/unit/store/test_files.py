"""What only happens to a store in a file: restarts, several processes, a full disk, older schemas."""

import asyncio
import sqlite3
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from gateway.errors import GatewayError, StartError
from gateway.records import Session
from gateway.store import transcript_rows
from gateway.store.database import finish
from gateway.store.schema import MIGRATIONS, migrate
from gateway.store.sqlite import SqliteStore
from gateway.store.sqlite_db import SqliteDb
from gateway.store.store import Store
from gateway.store.types import OrphanedSalt, Text, WindowQuery
from tests.support.gateway_process import ROOT
from tests.support.store_records import (
    ODD,
    TENANT,
    Open,
    add,
    finished,
    manifest,
    messages_of,
    only_sqlite,
    says,
    window,
)
from tests.support.tier_harness import key, keys, small_disk

pytestmark = pytest.mark.anyio


async def test_a_restart_finds_everything(open_store: Open) -> None:
    async with open_store() as store:
        name = store.store_id
        await store.record([finished("s", ODD)])
        await add(store, "w", keys(2), tags=("x",))
        before = (await store.session(TENANT, "s"), await store.window(TENANT, "w"), await store.turns(TENANT, "s", 9))
    async with open_store() as store:
        assert store.store_id == name
        after = (await store.session(TENANT, "s"), await store.window(TENANT, "w"), await store.turns(TENANT, "s", 9))
        assert after == before
        assert await messages_of(store, "s") == ODD
        assert await store.manifest(window("w")) == manifest("w", keys(2))


async def test_pending_writes_are_done_before_closing(open_store: Open) -> None:
    async with open_store() as store:
        writes = [asyncio.create_task(store.record([finished(f"s{n}", says("1", "a"))])) for n in range(300)]
        await asyncio.sleep(0)  # all of them are on their way
    await asyncio.gather(*writes)
    async with open_store() as store:
        _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
        assert total == 300


async def test_two_stores_on_one_file_share_data_and_id(open_store: Open) -> None:
    async with open_store() as one, open_store() as other:
        assert one.store_id == other.store_id
        await asyncio.gather(
            *(one.record([finished(f"a{n}", says("1", "x"))]) for n in range(50)),
            *(other.record([finished(f"b{n}", says("1", "y"))]) for n in range(50)),
            *(
                s.add_window(window(f"w{n}"), manifest(f"w{n}", [key(n)]), Text(says(f"{n}")))
                for n in range(20)
                for s in (one, other)
            ),
        )
        for store in (one, other):
            assert (await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0))[1] == 100
            assert (await store.list_windows(TENANT, WindowQuery()))[1] == 20
            assert await messages_of(store, "a7") == says("1", "x")


@only_sqlite
async def test_cancelled_caller_waits_for_its_write(store: Store, tmp_path: Path) -> None:
    """It holds the lock on pins that are dropped unless a window has them by then."""
    with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # nobody else writes
        adding = asyncio.create_task(store.add_sessions([Session(TENANT, "s", "l")]))
        await asyncio.sleep(0)
        adding.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not adding.done()
        db.execute("ROLLBACK")
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert await store.session(TENANT, "s")


WRITER = """
import asyncio, sys
from pathlib import Path
from gateway.store.sqlite import SqliteStore
from gateway.kv.keys import ObjectKey
from tests.support.store_records import TENANT, add, finished, says
from tests.support.tier_harness import key
async def write(name):
    async with SqliteStore(Path(sys.argv[1]), turns_kept=200) as store:
        for n in range(int(sys.argv[3])):
            await store.record([finished(f"s-{name}", says(*map(str, range(2 * n + 2))))])
            await add(store, f"w-{name}-{n}", [key(n), key(n + 1)])
            print(n, flush=True)
asyncio.run(write(sys.argv[2]))
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[bytes]:
    """Another process that writes turns and windows, and prints what was committed."""
    argv = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0)  # what was not read stays in the pipe


def committed(process: subprocess.Popen[bytes]) -> int:
    """How many commits it printed, after it has ended."""
    out, _ = process.communicate(timeout=60)
    return len(out.splitlines())


def sound(path: Path) -> None:
    """SQLite reports no damage, and no foreign key is dangling."""
    with closing(sqlite3.connect(path)) as db:
        found = [text for (text,) in db.execute("PRAGMA integrity_check")]
        assert found == ["ok"]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


async def whole(store: Store, name: str) -> int:
    """How many windows of a writer there are; each has to be complete."""
    count = 0
    while (one := await store.window(TENANT, f"w-{name}-{count}")) is not None:
        assert [o.key for o in (await store.manifest(one)).objects] == [str(key(count)), str(key(count + 1))]
        count += 1
    return count


async def test_processes_that_start_at_once_make_one_store_and_write_it_together(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    others = [writer(path, name, 20) for name in ("a", "b")]
    assert [await asyncio.to_thread(committed, other) for other in others] == [20, 20]
    async with SqliteStore(path, turns_kept=200) as store:
        assert [await whole(store, "a"), await whole(store, "b")] == [20, 20]
        for name in ("a", "b"):
            assert len(await messages_of(store, f"s-{name}")) == 40
            assert len(await store.turns(TENANT, f"s-{name}", 99)) == 20
    sound(path)


@pytest.mark.parametrize("after", [1, 15])
async def test_kill_during_a_write_loses_nothing_committed(tmp_path: Path, after: int) -> None:
    path = tmp_path / "gateway.db"
    other = writer(path, "a", 10_000)
    assert other.stdout is not None
    for _ in range(after):
        assert other.stdout.readline()
    other.kill()
    told = after + await asyncio.to_thread(committed, other)
    async with SqliteStore(path, turns_kept=200) as store:
        assert told <= await whole(store, "a") <= told + 1
        assert len(await messages_of(store, "s-a")) in (2 * told, 2 * told + 2)
    sound(path)


@pytest.fixture
def two_megabytes(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    try:
        with small_disk(tmp_path / "small", "size=2m") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"only root may mount a small file system: {error}")


async def test_full_disk_is_reported_and_the_store_recovers(two_megabytes: Path) -> None:
    path = two_megabytes / "gateway.db"
    async with SqliteStore(path, turns_kept=5) as store:
        await store.record([finished("before", says("1", "a"))])
        crowd = two_megabytes / "crowd"
        crowd.write_bytes(bytes(1_000_000))
        kept, codes = 0, set()
        for n in range(40):
            try:
                await store.record([finished(f"s{n}", [{"role": "user", "content": f"{n}" + "x" * 50_000}])])
                kept += 1
            except GatewayError as error:
                codes.add(error.code)
        assert codes == {"storage_full"}
        assert 0 < kept < 40
        assert await messages_of(store, "before") == says("1", "a")
        crowd.unlink()
        await store.record([finished("after", says("2", "b"))])
        assert await messages_of(store, "after") == says("2", "b")
        _, total = await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0)
        assert total == kept + 2
    sound(path)


async def test_shared_objects_count_once_for_a_tenant(store: Store) -> None:
    first = await add(store, "a", keys(3))
    assert await store.copy_window(replace(first, name="copy"), first, None)
    await add(store, "b", [*keys(2), key(9)])
    await add(store, "c", [key(7)], tenant="other", manifest="m-c")
    more = manifest("x", [key(0), key(7), key(8)]).objects  # held, another tenant's, nobody's
    assert await store.held_bytes(TENANT, []) == 4 * 50
    assert await store.held_bytes(TENANT, more) == 6 * 50
    assert await store.held_bytes("nobody", more) == 3 * 50


async def test_data_of_an_older_store_is_migrated(tmp_path: Path) -> None:
    path, old = tmp_path / "gateway.db", manifest("w", [key(2), key(1)], ("disk", "redis"))
    talk = says("a" * 5000, "b")
    with closing(sqlite3.connect(path)) as db:
        for statement in chain(*MIGRATIONS[:9]):
            db.execute(statement)
        db.execute("PRAGMA user_version = 9")
        db.execute(
            """INSERT INTO sessions (tenant, id, lineage, model, fingerprint, salt, state, token_count, turn_count,
                created_at, last_active_at, head, asked, tip)
            VALUES (?, 's', 'l', 'demo', 'fp', 'salt', 'active', 2, 1, 1, 2, x'01', x'02', x'03')""",
            (TENANT,),
        )
        db.execute("INSERT INTO beginnings VALUES (?, x'03', 's')", (TENANT,))
        db.execute("INSERT INTO loose_salts VALUES ('old', ?, 'l', 5.0)", (TENANT,))
        db.execute("INSERT INTO manifests VALUES (?, ?)", (old.id, array("I", old.token_ids).tobytes()))
        db.executemany("INSERT INTO objects VALUES (?, ?, ?, ?)", [o[:4] for o in old.objects])
        held = [(old.id, n // 2, o.key, o.tier) for n, o in enumerate(old.objects)]
        db.executemany("INSERT INTO manifest_objects VALUES (?, ?, ?, ?)", held)
        tip = finish(transcript_rows.add(SqliteDb(db), talk))
        db.commit()
    assert tip is not None
    async with SqliteStore(path, turns_kept=5) as store:
        assert await store.manifest(window("w")) == old
        assert await store.held_objects() == {key(1), key(2)}
        assert await store.messages(tip) == talk
        assert await store.windows_without_text() == []
        _, (session,) = await store.sessions_by_prefix(TENANT, [b"\x03"])
        assert (session.first_message_hash, session.last_request_hash, session.last_reply_hash) == (b"\1", b"\2", b"\3")
        assert await store.orphaned_salts() == [OrphanedSalt("old", TENANT, "l", 5.0)]
    sound(path)


def test_foreign_keys_are_enforced_after_a_migration(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as db:
        migrate(db)
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            db.execute("INSERT INTO links VALUES (x'01', NULL, x'02', 0)")


async def test_tag_of_most_windows_is_listed_in_order_and_counted(store: Store) -> None:
    first = await add(store, "w-000", tags=("all", "odd0"), created_at=0.0)
    for number in range(1, 600):
        tags = ("all", f"odd{number % 2}")
        more = replace(first, name=f"w-{number:03}", tags=tags, created_at=float(number))
        assert await store.copy_window(more, first, None)
    assert await store.copy_window(replace(first, name="none", tags=(), created_at=700.0), first, None)
    for tags, expected in (
        (("all",), [f"w-{number:03}" for number in range(599, -1, -1)]),
        (("odd1",), [f"w-{number:03}" for number in range(599, -1, -2)]),
        (("all", "odd1", "all"), [f"w-{number:03}" for number in range(599, -1, -2)]),
    ):
        for offset in (0, 7, len(expected) - 3):
            page, total = await store.list_windows(TENANT, WindowQuery(tags=tags, limit=5, offset=offset))
            assert ([one.name for one in page], total) == (expected[offset : offset + 5], len(expected))
    page, total = await store.list_windows(TENANT, WindowQuery(tags=("all",), created_after=590.0))
    assert ([one.name for one in page], total) == ([f"w-{number:03}" for number in range(599, 590, -1)], 9)
    page, total = await store.list_windows(TENANT, WindowQuery(tags=("all",), session_id="nobody"))
    assert (page, total) == ([], 0)


async def test_the_schema_of_a_new_store_is_the_newest(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "gateway.db", turns_kept=5):
        pass
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert (tmp_path / "gateway.db").stat().st_mode & 0o777 == 0o600


async def test_store_of_a_newer_gateway_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StartError, match=f"schema {len(MIGRATIONS) + 1}.*newer gateway"):
        async with SqliteStore(path, turns_kept=5):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


async def test_file_that_is_no_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    path.write_bytes(b"this is not a database\n" * 500)
    before = path.read_bytes()
    with pytest.raises(StartError, match=r"gateway\.db cannot be opened"):
        async with SqliteStore(path, turns_kept=5):
            pass
    assert path.read_bytes() == before


async def test_foreign_database_is_refused_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "gateway.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE sessions (mine TEXT)")
        db.execute("INSERT INTO sessions VALUES ('x')")
        db.commit()
    with pytest.raises(StartError, match="sessions already exists"):
        async with SqliteStore(path, turns_kept=5):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("sessions",)]
