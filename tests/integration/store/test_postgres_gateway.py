"""A gateway whose store is a PostgreSQL server that is far away, or goes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.api.test_server import assert_one_clear_line, serve
from tests.integration.sessions.test_conversations import ask
from tests.support import postgres
from tests.support.conversations import assistant, user
from tests.support.fakes.engine import WITHIN, Exchange, FakeEngine
from tests.support.gateway_process import eventually, gateway_in_front_of
from tests.support.postgres import PostgresServer
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    if postgres.binaries() is None:
        pytest.skip(postgres.MISSING)
    with PostgresServer() as server:
        yield server


def test_two_clients_with_the_same_reply_continue_in_two_sessions(
    engine: FakeEngine, tmp_path: Path, postgres_server: PostgresServer, postgres_url: str, session: str
) -> None:
    """Each request waits for the store several times, and the other one must not find the same meanwhile."""
    both = threading.Barrier(2, timeout=WITHIN)
    found: list[str] = []

    def answer(exchange: Exchange) -> None:
        both.wait()
        engine.answer_chat(exchange)

    with TcpProxy(postgres_server.port) as proxy:
        url = postgres_url.replace(str(postgres_server.port), str(proxy.port))
        with gateway_in_front_of(engine.url, tmp_path, store_url=url) as gateway:
            proxy.delay_s = 0.1
            separate = {ask(gateway, [user(session)]) for _ in range(2)}
            engine.on_chat = answer
            work = [
                threading.Thread(
                    target=lambda text=text: found.append(
                        ask(gateway, [user(session), assistant("Hello there!"), user(text)])
                    )
                )
                for text in ("one", "two")
            ]
            for thread in work:
                thread.start()
            for thread in work:
                thread.join()
    assert set(found) == separate


def test_no_session_is_made_of_a_known_conversation_while_the_store_is_down(
    engine: FakeEngine, tmp_path: Path, own_server: PostgresServer, session: str
) -> None:
    talk = [user(session)]

    def answer(exchange: Exchange) -> None:
        own_server.stop()
        engine.answer_chat(exchange)

    with gateway_in_front_of(engine.url, tmp_path, store_url=own_server.new_database()) as gateway:
        first = ask(gateway, talk)
        gateway.turns(first)
        talk += [assistant("Hello there!"), user("more")]
        engine.on_chat = answer
        assert ask(gateway, talk) == first  # the reply gets through
        engine.on_chat = engine.answer_chat
        talk += [assistant("Hello there!"), user("and more")]
        for asked in (
            lambda: gateway.http.post("/v1/chat/completions", json={"model": "demo", "messages": talk}),
            lambda: gateway.chat(first),
            lambda: gateway.http.get(f"/admin/sessions/{first}"),
            lambda: gateway.http.get("/admin/windows"),
        ):
            refused = asked()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable"), refused.text
        eventually(lambda: gateway.http.get("/readyz").status_code == 503, "not ready")
        own_server.start()
        eventually(lambda: gateway.http.get("/readyz").status_code == 200, "ready again")
        assert ask(gateway, talk) == first
        assert len(gateway.turns(first, 3)) == 3
        assert gateway.http.get("/admin/sessions").json()["total"] == 1


def test_doctor_counts_connections(engine: FakeEngine, tmp_path: Path, postgres_url: str) -> None:
    with gateway_in_front_of(engine.url, tmp_path, store_url=postgres_url) as gateway:
        checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
        (store,) = [check for check in checks if check["name"] == "store"]
        assert store["status"] == "ok"
        assert "connections are in use, 4 by this gateway at most" in store["message"]


def test_server_that_is_not_there_is_one_clear_line(engine: FakeEngine, tmp_path: Path) -> None:
    url = "postgresql://cwg:secret@127.0.0.1:1/cwg"
    ended = serve(engine_urls=engine.url, data_dir=tmp_path, store_url=url)
    assert_one_clear_line(ended, "127.0.0.1:1/cwg cannot be opened")
    assert "secret" not in ended.stderr
