"""What is particular to the store on PostgreSQL: its schema, several gateways at once, and a server that fails."""

import asyncio
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import asyncpg
import pytest

from gateway.errors import StartError
from gateway.records import Session
from gateway.store import copying
from gateway.store.postgres import schema as postgres_schema
from gateway.store.postgres.connections import Server
from gateway.store.postgres.failures import why_not_opened
from gateway.store.postgres.sql import translated
from gateway.store.postgres.store import PostgresStore
from gateway.store.schema import MIGRATIONS, migrate
from gateway.store.types import StoreUnavailable, Text, WindowQuery
from tests.support import postgres
from tests.support.postgres import PostgresServer
from tests.support.store_records import TENANT, add, count, finished, manifest, says, window
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

ONLY_HERE = {
    ("unindexed", "number"), ("unindexed", "content"), ("searchable", "words"),  # the full-text index
}  # fmt: skip


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    async with PostgresStore(Server(postgres_url), turns_kept=5) as store:
        yield store


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    if postgres.binaries() is None:
        pytest.skip(postgres.MISSING)
    with PostgresServer() as server:
        yield server


# --- the schema


async def test_both_databases_have_the_same_tables_and_columns(store: PostgresStore) -> None:
    rows = await store.run_read(
        lambda db: db.all(
            "SELECT table_name, column_name, is_nullable = 'NO' FROM information_schema.columns "
            "WHERE table_schema = 'public'"
        )
    )
    here = {(table, column): required for table, column, required in rows}
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        migrate(db)
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        there = {
            (table, row[1]): bool(row[3] or row[5])
            for table in tables if not table.startswith("sqlite_")
            for row in db.execute(f"PRAGMA table_info({table})")
        }  # fmt: skip
    assert here.keys() - there.keys() == ONLY_HERE
    assert {place: here[place] for place in there} == there
    assert postgres_schema.BASE + len(postgres_schema.MIGRATIONS) - 1 == len(MIGRATIONS)


async def test_both_databases_have_the_same_keys(store: PostgresStore) -> None:
    rows = await store.run_read(
        lambda db: db.all(
            """SELECT t.relname, string_agg(a.attname, ',' ORDER BY k.place)
            FROM pg_constraint c JOIN pg_class t ON t.oid = c.conrelid,
                unnest(c.conkey) WITH ORDINALITY k (number, place), pg_attribute a
            WHERE c.contype = 'p' AND a.attrelid = t.oid AND a.attnum = k.number GROUP BY t.relname"""
        )
    )
    here = {table: tuple(names.split(",")) for table, names in rows}
    assert {table.name: here[table.name] for table in copying.tables()} == {
        table.name: table.key for table in copying.tables()
    }


async def test_gateways_that_start_at_once_make_one_store(postgres_url: str) -> None:
    stores = [PostgresStore(Server(postgres_url), turns_kept=5) for _ in range(4)]
    await asyncio.gather(*(one.__aenter__() for one in stores))
    assert len({one.store_id for one in stores}) == 1
    await asyncio.gather(*(one.__aexit__() for one in stores))


async def test_database_of_a_newer_gateway_is_refused_and_not_changed(postgres_url: str) -> None:
    async with PostgresStore(Server(postgres_url), turns_kept=5) as store:
        await store.run_write(lambda db: db.run("UPDATE meta SET value = '999' WHERE name = 'schema'"))
    with pytest.raises(StartError, match=r"schema 999, this gateway knows .*newer gateway"):
        async with PostgresStore(Server(postgres_url), turns_kept=5):
            pass


async def test_a_later_step_is_taken_once(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    steps = (*postgres_schema.MIGRATIONS, ("CREATE TABLE later (name TEXT PRIMARY KEY, at REAL, body BLOB)",))
    for _ in range(2):
        await postgres_schema.migrate(connection)
    for _ in range(2):
        await postgres_schema.migrate(connection, steps)
    assert await connection.fetchval("SELECT count(*) FROM later") == 0
    await connection.close()


async def test_gateway_starts_on_a_newer_schema_if_every_step_to_it_is_compatible(postgres_url: str) -> None:
    newest = postgres_schema.BASE + len(postgres_schema.MIGRATIONS) - 1
    later = (*postgres_schema.MIGRATIONS, ("ALTER TABLE sessions ADD COLUMN colour TEXT NOT NULL DEFAULT ''",))
    async with PostgresStore(Server(postgres_url), turns_kept=5) as running:
        await running.record([finished("s", says("1", "x"))])
        assert await running.session(TENANT, "s")
        connection = await asyncpg.connect(postgres_url)
        await postgres_schema.migrate(connection, later, compatible={newest + 1})
        await running.record([finished("s", says("1", "x", "2", "y"))])
        async with PostgresStore(Server(postgres_url), turns_kept=5) as started:
            for store in (running, started):
                session = await store.session(TENANT, "s")
                assert session is not None
                assert session.turn_count == 2
            await started.record([finished("new", says("1", "x"))])
        await postgres_schema.migrate(
            connection, (*later, ("CREATE TABLE later (name TEXT)",)), compatible={newest + 1}
        )
        await connection.close()
    with pytest.raises(StartError, match=rf"schema {newest + 2}, this gateway knows {newest}: use a newer gateway"):
        async with PostgresStore(Server(postgres_url), turns_kept=5):
            pass


# --- several gateways


async def test_two_gateways_record_the_same_session(postgres_url: str) -> None:
    async with (
        PostgresStore(Server(postgres_url), turns_kept=500) as one,
        PostgresStore(Server(postgres_url), turns_kept=500) as other,
    ):
        await asyncio.gather(
            *(
                store.record([finished("s", says(*map(str, range(2 * n + 2)))), finished(f"s{n}", says("1", "x"))])
                for n in range(40)
                for store in (one, other)
            )
        )
        session = await one.session(TENANT, "s")
        assert session is not None
        assert session.turn_count == 80
        assert len(await other.turns(TENANT, "s", 500)) == 80
        assert await one.windows_without_text() == []


async def test_text_that_a_turn_builds_on_is_not_deleted_meanwhile(postgres_url: str) -> None:
    """A link is added below one that the deletion of its last session is about to remove."""
    async with (
        PostgresStore(Server(postgres_url), turns_kept=5) as one,
        PostgresStore(Server(postgres_url), turns_kept=5) as other,
    ):
        for number in range(30):
            began = says("begin", f"{number}")
            await one.record([finished("a", began)])
            await asyncio.gather(
                one.delete_session(TENANT, "a"),
                other.record([finished("b", [*began, *says("and", "so")])]),
                other.add_window(window(f"w{number}"), manifest(f"w{number}"), Text(began)),
            )
            session = await other.session(TENANT, "b")
            assert session is not None
            assert session.transcript is not None
            assert await other.messages(session.transcript) == [*began, *says("and", "so")]
            await other.delete_session(TENANT, "b")
        assert await one.windows_without_text() == []
        assert (await one.list_windows(TENANT, WindowQuery()))[1] == 30


async def test_a_name_is_given_once(postgres_url: str) -> None:
    async with (
        PostgresStore(Server(postgres_url), turns_kept=5) as one,
        PostgresStore(Server(postgres_url), turns_kept=5) as other,
    ):
        made = await asyncio.gather(
            *(s.add_window(window("w"), manifest("w"), Text(says("a"))) for _ in range(5) for s in (one, other))
        )
        assert sum(result is not None for result in made) == 1
        added = await asyncio.gather(*(s.add_sessions([Session(TENANT, "t", "l")]) for s in (one, other) * 5))
        assert sorted(added, key=str) == [None, *["t"] * 9]


async def test_reads_that_are_asked_together_are_answered_apart(store: PostgresStore) -> None:
    await store.record([finished(f"s{n}", says(f"{n}", "x")) for n in range(20)])
    await add(store, "w")
    ids = [f"s{n}" for n in range(25)]
    sessions = await asyncio.gather(*(store.session(TENANT, one) for one in ids), store.session("other", "s1"))
    assert [one and one.id for one in sessions] == [*ids[:20], *[None] * 6]
    alone = [await store.session(TENANT, one) for one in ids[:20]]
    assert sessions[:20] == alone
    windows = await asyncio.gather(*(store.window(TENANT, name) for name in ("w", "x", "w")))
    assert windows[0] is not None
    assert windows == [windows[0], None, windows[0]]
    assert windows[0] == await store.window(TENANT, "w")


async def test_reads_of_the_request_path_are_planned_once_and_found_alike_together(store: PostgresStore) -> None:
    """PostgreSQL plans a statement anew for each execution while it expects to gain by that; the first five always."""
    records = [finished(f"s{n}", says(f"{n}", "x")) for n in range(12)]
    await store.record(records)
    chains = [[b"-", one.trace.reply_hash or b"", one.trace.request_hash] for one in records]
    alone = [await store.sessions_by_prefix(TENANT, chain[: 1 + n % 3]) for n, chain in enumerate(chains)]
    together = await asyncio.gather(
        *(store.sessions_by_prefix(TENANT, chain[: 1 + n % 3]) for n, chain in enumerate(chains))
    )
    assert [(link, [one.id for one in found]) for link, found in alone] == [
        (chain[1], [f"s{n}"]) if n % 3 else (None, []) for n, chain in enumerate(chains)
    ]
    assert alone == together
    query = """SELECT CAST(generic_plans AS BIGINT), CAST(custom_plans AS BIGINT) FROM pg_prepared_statements
        WHERE statement LIKE 'SELECT l.link, s.%'"""
    ((generic, custom),) = await store.run_inline(lambda db: db.all(query))
    assert (generic >= 7, custom) == (True, 5)


async def test_a_cancelled_read_affects_no_other(store: PostgresStore) -> None:
    await store.record([finished("s", says("1", "x"))])
    for _ in range(20):
        tasks = [asyncio.create_task(store.session(TENANT, "s")) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, Session) for one in found] == [False, True, False, True]


# --- a server that fails


async def test_restart_is_not_noticed(own_server: PostgresServer) -> None:
    url = await asyncio.to_thread(own_server.new_database)
    async with PostgresStore(Server(url), turns_kept=5) as store:
        for end in (own_server.stop, own_server.kill):
            await store.record([finished("s", says("1", "x"))])
            assert await store.session(TENANT, "s")
            await asyncio.to_thread(end)
            await asyncio.to_thread(own_server.start)
            await store.record([finished("s", says("1", "x", "2", "y"))])
            assert await store.session(TENANT, "s")
            assert (await store.list_sessions(TENANT, state=None, model=None, limit=1, offset=0))[1] == 1


async def test_server_that_is_down_is_reported_and_found_again(own_server: PostgresServer) -> None:
    url = await asyncio.to_thread(own_server.new_database)
    async with PostgresStore(Server(url), turns_kept=5) as store:
        await store.record([finished("s", says("1", "x"))])
        await asyncio.to_thread(own_server.stop)
        turns = [finished("s", says("1", "x", "2", "y"))]
        for attempt in (
            store.session(TENANT, "s"),
            store.window(TENANT, "w"),
            store.turns(TENANT, "s", 5),
            store.record(turns),
            store.check(),
        ):
            with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:\d+/\w+ does not answer") as caught:
                await attempt
            assert (caught.value.code, caught.value.retryable) == ("store_unavailable", True)
        await asyncio.to_thread(own_server.start)
        await store.record(turns)
        session = await store.session(TENANT, "s")
        assert session is not None
        assert session.turn_count == 2


async def test_silent_server_is_reported_and_found_again(own_server: PostgresServer) -> None:
    url = await asyncio.to_thread(own_server.new_database)
    async with PostgresStore(Server(url, answer_s=0.3), turns_kept=5) as store:
        await store.record([finished("s", says("1", "x"))])
        assert await store.session(TENANT, "s")
        own_server.signal(signal.SIGSTOP)
        for attempt in (store.session(TENANT, "s"), store.turns(TENANT, "s", 5), store.check()):
            with pytest.raises(StoreUnavailable, match=r"does not answer|was lost"):
                await attempt
        own_server.signal(signal.SIGCONT)
        await store.record([finished("s", says("1", "x", "2", "y"))])
        assert await store.session(TENANT, "s")
        assert await store.turns(TENANT, "s", 5)


async def test_a_commit_without_an_answer_is_done_once(postgres_server: PostgresServer, postgres_url: str) -> None:
    with TcpProxy(postgres_server.port) as proxy:
        url = postgres_url.replace(str(postgres_server.port), str(proxy.port))
        async with PostgresStore(Server(url), turns_kept=5) as store:
            for number in range(1, 4):
                proxy.cut_at = b"COMMIT"
                await store.record([finished("s", says("1", "x"), at=float(number))])
                assert proxy.cut_at == b""
                assert await count(store, "turns") == number


async def test_turns_of_a_commit_that_stays_unknown_are_not_recorded_twice(own_server: PostgresServer) -> None:
    url = await asyncio.to_thread(own_server.new_database)
    with TcpProxy(own_server.port) as proxy:
        through = url.replace(str(own_server.port), str(proxy.port))
        async with PostgresStore(Server(through, answer_s=0.3), turns_kept=5) as store:
            turns = [finished("s", says("1", "x"))]
            proxy.cut_at = b"COMMIT"
            recording = asyncio.create_task(store.record(turns))
            await asyncio.to_thread(proxy.was_cut.wait)
            own_server.signal(signal.SIGSTOP)
            with pytest.raises(StoreUnavailable):
                await recording
            own_server.signal(signal.SIGCONT)
            await store.record(turns)
            assert await count(store, "turns") == 1


async def test_the_password_is_in_no_message(own_server: PostgresServer) -> None:
    port = own_server.port
    await asyncio.to_thread(own_server.stop)
    url = f"postgresql://cwg:secret@127.0.0.1:{port}/x?application_name=also-secret"
    with pytest.raises(StartError) as caught:
        async with PostgresStore(Server(url), turns_kept=5):
            pass
    assert "secret" not in str(caught.value)
    assert f"127.0.0.1:{port}/x" in str(caught.value)


# --- statements


def test_statements_are_translated() -> None:
    assert translated("a = ? AND b IS ? AND c LIKE ?") == "a = $1 AND b IS NOT DISTINCT FROM $2 AND c ILIKE $3"
    assert translated("a = ?2 OR b = ?1 OR ?2 IS NULL") == "a = $2 OR b = $1 OR $2 IS NULL"
    assert (
        translated("FROM s INDEXED BY i WHERE +s.a = ? ORDER BY +b, n + 1") == "FROM s WHERE s.a = $1 ORDER BY b, n + 1"
    )
    assert translated("FROM a CROSS JOIN b x ON x.i = a.j\n    LIMIT ?2 /* SQLite */) SELECT 1 LIMIT ?2") == (
        "FROM a CROSS JOIN LATERAL (SELECT * FROM b x WHERE x.i = a.j OFFSET 0) x) SELECT 1 LIMIT $2"
    )


def test_start_behind_a_pooler_that_loses_statements_names_the_setting() -> None:
    lost = asyncpg.DuplicatePreparedStatementError('prepared statement "__asyncpg_stmt_1__" already exists')
    assert "set store_statement_cache to 0" in why_not_opened(lost)
    assert why_not_opened(asyncpg.CannotConnectNowError("starting up")) == "starting up"
    assert why_not_opened(TimeoutError()) == "it does not answer"
