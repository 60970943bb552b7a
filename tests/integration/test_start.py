"""What stops a start, so that nothing is harmed: another gateway on the same data, or another secret."""

import sqlite3
from pathlib import Path

import pytest

from tests.integration.api.test_server import DEAD, assert_one_clear_line, serve
from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import Gateway, eventually, free_port, gateway_in_front_of


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_gateway_on_the_same_data_is_refused(engine: FakeEngine, tmp_path: Path, workers: int) -> None:
    with gateway_in_front_of(engine.url, tmp_path, workers=workers) as gateway:
        ended = serve(port=free_port(), engine_urls=DEAD, data_dir=gateway.data_dir)
        assert_one_clear_line(ended, f"another gateway (process {gateway.process.pid})", "data_dir")
        assert gateway.http.get("/metrics").status_code == 200
        gateway.process.kill()
        gateway.process.wait()
        eventually(lambda: _starts(gateway), "its lock went with it", within=30)


def _starts(gateway: Gateway) -> bool:
    before = len(gateway.log)
    gateway.start()
    eventually(lambda: gateway.process.poll() is not None or "listening on" in gateway.log[before:], "start or end")
    return gateway.process.poll() is None


def test_a_second_gateway_on_the_same_store_is_refused(engine: FakeEngine, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'elsewhere' / 'gateway.db'}"
    with gateway_in_front_of(engine.url, tmp_path, store_url=store):
        ended = serve(port=free_port(), engine_urls=DEAD, data_dir=tmp_path / "other", store_url=store)
        assert_one_clear_line(ended, "another gateway", "elsewhere")


# --- the secret


@pytest.fixture
def used(engine: FakeEngine, tmp_path: Path) -> Gateway:
    """A gateway that has been used, and has ended."""
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert gateway.chat("s").status_code == 200
        assert gateway.stop() == 0
    return Gateway(tmp_path, engine.url)


def ended_with_one_line(gateway: Gateway) -> str:
    """The last line of a gateway that does not start."""
    gateway.start()
    assert gateway.process.wait(20) == 1
    assert "Traceback" not in gateway.log
    return gateway.log.splitlines()[-1]


@pytest.mark.parametrize(("secret", "what"), [(None, "is missing"), ("f" * 64, "is not the one")])
def test_a_store_without_its_secret_stops_the_start(used: Gateway, secret: str | None, what: str) -> None:
    path = used.data_dir / "secret"
    own = path.read_text()
    path.unlink()
    if secret:
        path.write_text(secret)
    line = ended_with_one_line(used)
    assert what in line
    assert "accept_new_secret" in line
    assert path.exists() == bool(secret)  # nothing is made that a backup would have to replace
    path.write_text(own)
    path.chmod(0o600)
    try:
        assert used.start().wait().chat("s").status_code == 200
        assert used.log.count("can be read by others") == bool(secret)  # of the one that was not the store's
    finally:
        used.close()


def test_a_new_secret_is_accepted_on_request_and_becomes_the_stores(
    engine: FakeEngine, tmp_path: Path, used: Gateway
) -> None:
    (used.data_dir / "secret").write_text("f" * 64)
    (used.data_dir / "secret").chmod(0o640)
    with gateway_in_front_of(engine.url, tmp_path, accept_new_secret=True) as gateway:
        assert "KV stored under the old one will not be found" in gateway.log
        assert "can be read by others" in gateway.log
        assert gateway.stop() == 0
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert gateway.chat("s").status_code == 200


@pytest.mark.sqlite
def test_a_store_of_before_takes_the_secret_that_it_finds(engine: FakeEngine, tmp_path: Path, used: Gateway) -> None:
    with sqlite3.connect(used.data_dir / "gateway.db") as db:
        db.execute("DELETE FROM meta WHERE name = 'secret_mark'")
    db.close()
    with gateway_in_front_of(engine.url, tmp_path) as gateway:
        assert gateway.stop() == 0
    (used.data_dir / "secret").write_text("f" * 64)
    assert "is not the one" in ended_with_one_line(used)


def test_missing_kv_dir_and_old_variables_are_named_at_the_start(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CWM_VLLM_URL", "http://127.0.0.1:8000")
    with gateway_in_front_of(engine.url, tmp_path, kv_dir=str(tmp_path / "nowhere"), log_level="DEBUG") as gateway:
        assert gateway.chat("s").status_code == 200
        assert f"kv_dir {tmp_path / 'nowhere'} does not exist" in gateway.log
        assert "CWM_VLLM_URL is CWG_ENGINE_URLS here" in gateway.log
        assert "httpcore" not in gateway.log
