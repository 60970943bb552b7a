"""The process: one port, one clear line when it cannot start, and an end that loses nothing."""

import errno
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.fakes.engine import DONE, Exchange, FakeEngine, delta
from tests.support.gateway_process import ROOT, SERVE, Gateway, environment, eventually, free_port, gateway_in_front_of
from tests.support.raw_http import RawHttpClient

DEAD = "http://127.0.0.1:9"


def serve(**settings: object) -> subprocess.CompletedProcess[str]:
    """Start a gateway that is expected to end by itself."""
    given = environment({f"CWG_{name.upper()}": str(value) for name, value in settings.items()})
    return subprocess.run(SERVE, env=given, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def assert_one_clear_line(ended: subprocess.CompletedProcess[str], *says: str) -> None:
    """It failed with 1 and told why in one line for people."""
    errors = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert ended.returncode == 1, ended.stderr
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith("error: ")
    for words in says:
        assert words in errors[0]


@contextmanager
def store_locked(gateway: Gateway) -> Iterator[None]:
    """Nobody else can write to the store, or bring its schema up to date."""
    with closing(sqlite3.connect(gateway.data_dir / "gateway.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def test_a_port_that_is_in_use_is_one_clear_line(gateway: Gateway, tmp_path: Path) -> None:
    ended = serve(port=gateway.port, engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, str(gateway.port), "in use")
    assert gateway.http.get("/healthz").status_code == 200


@pytest.mark.sqlite
def test_a_port_cannot_be_taken_while_the_gateway_starts(tmp_path: Path) -> None:
    tmp_path.joinpath("data").mkdir()
    gateway = Gateway(tmp_path, DEAD)
    with store_locked(gateway), socket.socket() as rival:  # the start waits for it, after its look at the port
        refused = 0
        try:
            gateway.start()
            eventually((gateway.data_dir / "serve.lock").exists, "the start is under way")
            rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                rival.bind(("127.0.0.1", gateway.port))
                rival.listen()
            except OSError as error:
                refused = error.errno
            assert refused == errno.EADDRINUSE
        finally:
            gateway.close()


def test_an_address_that_is_not_ours_is_one_clear_line(tmp_path: Path) -> None:
    ended = serve(host="192.0.2.1", port=free_port(), api_key="k", engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, "192.0.2.1")


def test_a_store_of_a_newer_gateway_is_one_clear_line(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "gateway.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, "999", "newer gateway")


def test_a_store_that_is_not_a_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "gateway.db").write_bytes(b"garbage" * 1000)
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, "gateway.db")
    assert (tmp_path / "gateway.db").read_bytes() == b"garbage" * 1000


def test_a_data_dir_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path / "file" / "data")
    assert_one_clear_line(ended, str(tmp_path / "file"))


@pytest.mark.parametrize("secret", [b"", b"short", b"\n" * 40])
def test_an_unusable_secret_is_one_clear_line(tmp_path: Path, secret: bytes) -> None:
    (tmp_path / "secret").write_bytes(secret)
    ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path)
    assert_one_clear_line(ended, "secret", "32")
    assert (tmp_path / "secret").read_bytes() == secret


def test_a_pins_dir_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = serve(
        port=free_port(),
        engine_urls=DEAD,
        data_dir=tmp_path / "data",
        kv_dir=tmp_path,
        pins_dir=tmp_path / "file" / "pins",
    )
    assert_one_clear_line(ended, "pins_dir")


def test_a_start_without_redis_does_not_import_its_client() -> None:
    code = "import sys, gateway.app; sys.exit(any(name in sys.modules for name in ('redis', 'opentelemetry')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.sqlite
def test_it_says_that_it_listens_only_when_it_does(tmp_path: Path) -> None:
    tmp_path.joinpath("data").mkdir()
    gateway = Gateway(tmp_path, DEAD)
    try:
        with store_locked(gateway):
            gateway.start()
            eventually((gateway.data_dir / "serve.lock").exists, "the start is under way")
            said = "listening on" in gateway.log
            with socket.socket() as sock:
                sock.settimeout(1)
                assert said <= (sock.connect_ex(("127.0.0.1", gateway.port)) == 0)
        gateway.wait("/healthz")
        assert f"listening on {gateway.url}" in gateway.log
    finally:
        gateway.close()


def test_a_stream_that_ends_within_the_grace_time_is_served_to_its_end(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    asked_to_stop = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="one"))
        assert asked_to_stop.wait(5)
        exchange.chunk(delta(content="two"))
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    with gateway_in_front_of(engine.url, tmp_path) as gateway, RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        assert wire.chunk() == delta(content="one")
        gateway.process.send_signal(signal.SIGTERM)
        eventually(lambda: not _accepts(gateway.port), "no new connection is taken")
        asked_to_stop.set()
        assert wire.chunks() == [delta(content="two"), DONE]
        assert gateway.process.wait(5) in (0, -signal.SIGTERM)
        assert "Traceback" not in gateway.log
        gateway.start().wait()
        (turn,) = gateway.turns(session)
        assert turn["outcome"] == "completed"


def test_an_endless_stream_is_closed_after_the_grace_time_and_recorded(
    engine: FakeEngine, tmp_path: Path, session: str
) -> None:
    aborted = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="one"))
        if exchange.gone(5):  # less than the setting's default
            aborted.set()

    engine.on_chat = answer
    settings = {"shutdown_grace_s": 1}
    with gateway_in_front_of(engine.url, tmp_path, **settings) as gateway, RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        wire.head()
        wire.chunk()
        gateway.stop()
        assert aborted.wait(1)
        gateway.start().wait()
        (turn,) = gateway.turns(session)
        assert turn["outcome"] != "completed"


def test_turns_recorded_before_a_kill_are_there_after_it(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for count in range(1, 4):
            gateway.chat(session)
            gateway.turns(session, count)
            gateway.process.kill()
            gateway.process.wait()
            gateway.start().wait()
            assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == count


def test_many_turns_that_still_wait_at_the_end_are_recorded(engine: FakeEngine, tmp_path: Path, session: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        for _ in range(100):
            gateway.chat(session)
        gateway.stop()
        gateway.start().wait()
        assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 100


def _accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
