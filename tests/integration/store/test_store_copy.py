"""`cwg store copy`: everything comes along, and no store is used or copied that is not whole or not idle."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gateway.app import open_services
from gateway.errors import StartError
from gateway.kv.keys import ObjectKey
from gateway.records import Session
from gateway.settings import Settings
from gateway.store import copying
from gateway.store.membership import Membership
from gateway.store.postgres.connections import Server
from gateway.store.postgres.store import PostgresStore
from gateway.store.schema import migrate
from gateway.store.sqlite import SqliteStore
from gateway.store.types import Text
from tests.support.cli import cwg, cwg_process
from tests.support.store_records import TENANT, add, count, finished, says
from tests.support.tier_harness import key

pytestmark = pytest.mark.anyio


async def test_copy_has_everything_and_goes_back(tmp_path: Path, postgres_url: str) -> None:
    async with SqliteStore(tmp_path / "a.db", turns_kept=5) as old:
        await old.record([finished(f"s{n}", says(f"zebra {n}", "x"), at=float(n)) for n in range(30)])
        await add(old, "w", [key(1), key(2)], tags=("a", "b"), text=Text(says("quagga", "y"), {"f": 1}))
        await old.add_sessions([Session(TENANT, "t", "l", state="thawed", window="w")])
        await old.mark_orphaned("salt", TENANT, "l")
        async with PostgresStore(Server(postgres_url), turns_kept=5) as new:
            await copying.copy(old, new)
            with pytest.raises(StartError, match="not empty"):
                await copying.copy(old, new)
        async with (
            PostgresStore(Server(postgres_url), turns_kept=5) as new,
            SqliteStore(tmp_path / "b.db", turns_kept=5) as back,
        ):
            await copying.copy(new, back)
            for table in copying.tables():
                assert await count(new, table.name) == await count(back, table.name) == await count(old, table.name)
            for copied in (new, back):
                for name in ("s3", "t"):
                    assert await copied.session(TENANT, name) == await old.session(TENANT, name)
                made = await old.window(TENANT, "w")
                assert made is not None
                assert await copied.window(TENANT, "w") == made
                assert await copied.text(made) == await old.text(made)
                assert await copied.manifest(made) == await old.manifest(made)
                assert await copied.held_objects() == {ObjectKey.parse(str(key(1))), ObjectKey.parse(str(key(2)))}
                await copied.record([finished("s1", says("zebra 1", "x", "more", "z"))])  # numbers go on
            assert new.store_id == old.store_id
        async with SqliteStore(tmp_path / "b.db", turns_kept=5) as back:
            assert back.store_id == old.store_id


async def test_no_gateway_starts_on_a_copy_that_was_interrupted(tmp_path: Path) -> None:
    class Killed(Exception):
        """As by kill -9: nothing of the copy runs after it."""

    def interrupt(table: str, _: int) -> None:
        if table == "sessions":
            raise Killed

    async with SqliteStore(tmp_path / "a.db", turns_kept=5) as old, SqliteStore(tmp_path / "b.db", turns_kept=5) as new:
        await add(old, "w")
        with pytest.raises(Killed):
            await copying.copy(old, new, interrupt)
        with pytest.raises(StartError, match="unfinished copy"):
            await copying.copy(new, old)
    settings = Settings(
        data_dir=str(tmp_path), store_url=f"sqlite:///{tmp_path}/b.db", engine_urls=("http://127.0.0.1:9",)
    )
    with pytest.raises(StartError, match="unfinished copy"):
        async with open_services(settings):
            pass
    async with SqliteStore(tmp_path / "a.db", turns_kept=5) as old, SqliteStore(tmp_path / "c.db", turns_kept=5) as new:
        await copying.copy(old, new)
        await copying.check_finished(new)


def test_a_store_is_copied_within_its_folder_and_not_onto_itself(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as db:
        migrate(db)
    url = f"sqlite:///{tmp_path}"
    same = cwg("store", "copy", f"{url}/a.db", f"{url}/../{tmp_path.name}/a.db")
    assert (same.returncode, same.stderr) == (1, "error: FROM and TO are the same store\n")
    done = cwg_process("store", "copy", f"{url}/a.db", f"{url}/b.db")
    assert (done.returncode, done.stderr) == (0, "")


async def test_no_store_is_copied_that_a_gateway_uses(tmp_path: Path, postgres_url: str) -> None:
    async with PostgresStore(Server(postgres_url), turns_kept=5) as store:
        async with Membership(store):
            used = await asyncio.to_thread(cwg_process, "store", "copy", postgres_url, f"sqlite:///{tmp_path}/b.db")
            assert (used.returncode, "uses one of the stores: stop it" in used.stderr) == (1, True), used.stderr
        done = await asyncio.to_thread(cwg_process, "store", "copy", postgres_url, f"sqlite:///{tmp_path}/c.db")
        assert (done.returncode, done.stderr) == (0, "")
