"""Moments at which a gateway is killed, chosen from outside: in a transaction, after one, or before a file call."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType

import asyncpg
import httpx

from tests.support.fleet import gateway_of
from tests.support.gateway_process import Gateway, eventually
from tests.support.tcp_proxy import TcpProxy

_LOCK = 1  # an advisory lock that no gateway uses
_TABLES = ("windows", "pin_claims", "sessions", "turns", "auto_freezes")
_TRIGGER = f"""
CREATE TABLE moments (gateway TEXT, place TEXT);
CREATE FUNCTION wait_at_a_moment() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF EXISTS (SELECT 1 FROM moments
        WHERE gateway = current_setting('application_name') AND place = TG_OP || ' ' || TG_TABLE_NAME) THEN
        PERFORM pg_advisory_xact_lock({_LOCK});
    END IF;
    RETURN NULL;
END $$;
""" + "".join(
    f"CREATE TRIGGER wait_at_a_moment AFTER INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW "
    "EXECUTE FUNCTION wait_at_a_moment();"
    for table in _TABLES
)
_WAITS = f"""SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = {_LOCK} AND NOT granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""
# Python tells an audit hook what a process is about to do; PYTHONPATH gets this one into a gateway as it is.
_HOOK = """
import os, signal, sys

armed, seen = os.path.join(os.path.dirname(__file__), f"armed-{os.getpid()}"), 0


def kill_at(event, arguments):
    global seen
    if event in ("os.link", "os.rename", "os.remove") and os.path.exists(armed):
        with open(armed) as file:
            wanted, number, *within = file.read().split()
        if event == wanted and all(one in str(arguments) for one in within):
            seen += 1
            if seen == int(number):
                os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill_at)
"""


@dataclass(frozen=True, slots=True)
class InTransaction:
    """After a statement like `INSERT windows`, before its transaction is committed."""

    place: str


@dataclass(frozen=True, slots=True)
class AfterCommit:
    """When the transaction with such a statement has been committed, and the gateway does not know it yet."""

    place: str


@dataclass(frozen=True, slots=True)
class BeforeFile:
    """Before the nth call of `os.link`, `os.rename` or `os.remove` with a path that contains `folder`."""

    call: str
    folder: str
    number: int = 1


Moment = InTransaction | AfterCommit | BeforeFile


class Victim:
    """A gateway that will be killed. Its connections to the store go through a proxy of its own."""

    def __init__(self, folder: Path, name: str, engines: str, store_url: str, **settings: object) -> None:
        self.name = name
        self._hooks = folder / "hooks"
        self._hooks.mkdir(exist_ok=True)
        (self._hooks / "sitecustomize.py").write_text(_HOOK)
        host, _, database = store_url.rpartition("/")
        address, _, port = host.rpartition(":")
        self.proxy = TcpProxy(int(port))
        url = f"{address}:{self.proxy.port}/{database}?application_name={name}"
        self.gateway = gateway_of(folder, name, engines, url, PYTHONPATH=self._hooks, **settings)

    def __enter__(self) -> "Victim":
        self.proxy.__enter__()
        self.gateway.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.gateway.close()
        self.proxy.__exit__()

    def arm(self, moment: BeforeFile, of: str) -> None:
        """Have it die there; only files with `of` in their name count."""
        armed = self._hooks / f"armed-{self.gateway.process.pid}"
        armed.write_text(f"{moment.call} {moment.number} {moment.folder} {of}")

    def kill(self) -> None:
        """SIGKILL, if it is not dead yet."""
        self.gateway.process.kill()
        self.gateway.process.wait()


class Moments:
    """Kills gateways of one store at moments."""

    def __init__(self, store_url: str) -> None:
        self._url = store_url

    def __enter__(self) -> "Moments":
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(asyncpg.connect(self._url))
        self.run(_TRIGGER)
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._connection.close())
        self._runner.close()

    def run(self, statements: str) -> None:
        """Run some statements."""
        self._runner.run(self._connection.execute(statements))

    def rows(self, query: str) -> list[asyncpg.Record]:
        """The rows of a query."""
        rows: list[asyncpg.Record] = self._runner.run(self._connection.fetch(query))
        return rows

    def kill(self, victim: Victim, moment: Moment, work: Callable[[Gateway], object], of: str = "") -> None:
        """Let `work` be done by the victim, which is killed at the moment; `of` as in `Victim.arm`."""
        if isinstance(moment, BeforeFile):
            victim.arm(moment, of)
            with _doing(victim, work):
                assert victim.gateway.process.wait(20) == -signal.SIGKILL
            return
        with self._armed(victim.name, moment.place), _doing(victim, work):
            eventually(lambda: bool(self.rows(_WAITS)[0][0]), f"{moment} is reached", more=lambda: victim.gateway.log)
            if isinstance(moment, AfterCommit):
                victim.proxy.mute_at = b"COMMIT"
                self.run(f"SELECT pg_advisory_unlock({_LOCK})")
                assert victim.proxy.was_cut.wait(20)
            victim.kill()

    @contextmanager
    def _armed(self, name: str, place: str) -> Iterator[None]:
        self.run(f"SELECT pg_advisory_lock({_LOCK})")
        self.run(f"INSERT INTO moments VALUES ('{name}', '{place}')")
        try:
            yield
        finally:
            self.run("SELECT pg_advisory_unlock_all(); DELETE FROM moments")


@contextmanager
def _doing(victim: Victim, work: Callable[[Gateway], object]) -> Iterator[None]:
    def do() -> None:
        with suppress(httpx.TransportError):
            work(victim.gateway)

    thread = Thread(target=do)
    thread.start()
    try:
        yield
    finally:
        victim.kill()
        thread.join()
