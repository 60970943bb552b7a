"""Two gateways on one PostgreSQL: a conversation goes on through either, and no window loses anything to the other."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from tests.support.fakes.engine import MODEL, FakeEngine
from tests.support.fakes.lmcache import FakeLMCache
from tests.support.fakes.responses import serve
from tests.support.fleet import LEASE_S, gateway_of, two_gateways
from tests.support.gateway_process import Gateway, eventually
from tests.support.postgres import execute
from tests.support.stored_answers import answer_of, ask

ALTERNATIONS = 40
Pair = tuple[Gateway, Gateway]


@pytest.fixture
def pair(engine: FakeEngine, postgres_url: str, tmp_path: Path) -> Iterator[Pair]:
    with two_gateways(tmp_path, engine, postgres_url) as pair:
        yield pair


@pytest.fixture
def cache(engine: FakeEngine, tmp_path: Path) -> Iterator[FakeLMCache]:
    cache = FakeLMCache(tmp_path / "kv").start().behind(engine)
    yield cache
    cache.stop()


@pytest.fixture
def windows(engine: FakeEngine, cache: FakeLMCache, postgres_url: str, tmp_path: Path) -> Iterator[Pair]:
    """Both gateways, on one disk tier. They are never ready: the fake engine proves no isolation."""
    tier = {"cache_url": cache.url, "kv_dir": cache.folder, "freeze_timeout_s": 0.5}
    with two_gateways(tmp_path, engine, postgres_url, "/healthz", **tier) as pair:
        yield pair


def say(gateway: Gateway, messages: list[dict[str, Any]], text: str, **headers: str) -> httpx.Response:
    """Add a message, send the conversation, and add the reply."""
    messages.append({"role": "user", "content": text})
    answer = gateway.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages}, headers=headers)
    assert answer.status_code == 200, answer.text
    messages.append(answer.json()["choices"][0]["message"])
    return answer


def turn_counts(gateway: Gateway) -> list[int]:
    return [one["turn_count"] for one in gateway.http.get("/admin/sessions").json()["sessions"]]


def test_conversation_goes_on_through_the_other_gateway_at_once(pair: Pair) -> None:
    messages: list[dict[str, Any]] = []
    first = say(pair[0], messages, "hello, this is a conversation of its own")
    for number in range(1, ALTERNATIONS):
        answer = say(pair[number % 2], messages, f"and {number}")
        assert answer.headers["x-session-id"] == first.headers["x-session-id"], f"turn {number}"
    # The last turn may be of the other gateway, which records it in a moment.
    eventually(lambda: turn_counts(pair[0]) == [ALTERNATIONS], "one session", more=lambda: str(turn_counts(pair[0])))


def test_many_conversations_go_on_at_once(pair: Pair) -> None:
    failed: list[str] = []

    def talk(name: int) -> None:
        messages: list[dict[str, Any]] = []
        ids = set()
        try:
            for number in range(10):
                ids.add(say(pair[(name + number) % 2], messages, f"{name} says {number}").headers["x-session-id"])
        except AssertionError as error:
            failed.append(repr(error))
        if len(ids) != 1:
            failed.append(f"{name}: {ids}")

    threads = [threading.Thread(target=talk, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_response_is_continued_through_the_other_gateway(pair: Pair, engine: FakeEngine) -> None:
    serve(engine)
    previous, sessions = None, set()
    for number in range(10):
        answer = ask(pair[number % 2], f"and {number}", previous)
        previous = answer_of(answer)["id"]
        sessions.add(answer.headers["x-session-id"])
    assert len(sessions) == 1


def test_session_of_a_name_has_its_last_turn_in_the_other_gateway(pair: Pair, session: str) -> None:
    for number in range(6):
        assert pair[number % 2].chat(session, f"{number}").status_code == 200
        window = f"{session}-{number}"
        assert pair[(number + 1) % 2].freeze(session, window).status_code == 201
        messages = pair[0].http.get(f"/admin/windows/{window}/messages").json()["messages"]
        assert messages[-2]["content"] == f"{number}"


def test_turn_in_one_gateway_keeps_a_session_busy_in_the_other(
    engine: FakeEngine, postgres_url: str, tmp_path: Path, session: str
) -> None:
    with two_gateways(tmp_path, engine, postgres_url, busy_wait_s=0.3) as (a, b):
        assert a.chat(session).status_code == 200
        goes_on = threading.Event()
        engine.before_completion = lambda: None
        engine.on_chat = lambda exchange: (goes_on.wait(30), engine.answer_chat(exchange))  # type: ignore[func-returns-value]
        turn = threading.Thread(target=a.chat, args=(session, "again"))
        turn.start()
        eventually(lambda: b.freeze(session, "w").status_code == 409, "the other gateway knows of the turn")
        goes_on.set()
        turn.join()
        eventually(lambda: b.freeze(session, "w").status_code == 201, "the turn is recorded")


def test_gateway_that_was_stopped_for_longer_than_its_lease_loses_nothing(
    windows: Pair, cache: FakeLMCache, postgres_url: str, session: str
) -> None:
    a, b = windows
    assert a.chat(session, "hello there, how are you? " * 5).status_code == 200
    reached, stopped = threading.Event(), threading.Event()

    def stop(name: str) -> bool:
        reached.set()
        return stopped.wait(30)

    cache.before_write = stop  # the freeze waits for its objects meanwhile, under its claim
    cache.evict()
    freezing = threading.Thread(target=a.freeze, args=(session, "w"))
    freezing.start()
    assert reached.wait(30)
    a.process.send_signal(signal.SIGSTOP)
    stopped.set()
    eventually(lambda: _alive(postgres_url) == 1, "its lease has ended", LEASE_S + 20)
    a.process.send_signal(signal.SIGCONT)
    freezing.join()
    _whole(b, "w")
    assert _pinned(b) == _held(b)


def test_windows_of_one_gateway_survive_what_the_other_does(windows: Pair, cache: FakeLMCache) -> None:
    a, b = windows
    over = threading.Event()

    def freeze_and_delete() -> None:
        number = 0
        while not over.is_set():
            number += 1
            b.freeze("s", f"b-{number}")
            b.http.delete(f"/admin/windows/b-{number}")

    assert a.chat("s", "hello there, how are you? " * 5).status_code == 200
    other = threading.Thread(target=freeze_and_delete)
    other.start()
    try:
        for number in range(15):
            answer = a.freeze("s", f"a-{number}")
            assert (answer.status_code, answer.json()["kv"]) == (201, "complete")
            if number % 3:
                assert a.http.delete(f"/admin/windows/a-{number}").status_code == 200
    finally:
        over.set()
        other.join()
    for name in _names(a):
        _whole(a, name)
    eventually(lambda: _pinned(a) == _held(a), "nothing is pinned for nobody")


def test_gateway_with_another_secret_refuses_to_start(
    pair: Pair, engine: FakeEngine, postgres_url: str, tmp_path: Path
) -> None:
    other = gateway_of(tmp_path, "c", engine.url, postgres_url, secret_file=tmp_path / "c" / "secret")
    (tmp_path / "c" / "secret").write_text("x" * 64)
    try:
        assert other.start().process.wait(60) == 1
        assert "give all of them the same secret" in other.log
    finally:
        other.close()


@pytest.mark.parametrize(("protocol", "age"), [(0, "an older"), (9, "a newer")])
def test_gateway_refuses_to_start_beside_one_of_another_protocol(
    engine: FakeEngine, postgres_url: str, tmp_path: Path, protocol: int, age: str
) -> None:
    with closing(gateway_of(tmp_path, "a", engine.url, postgres_url)) as gateway:
        gateway.start().wait()
        assert gateway.stop() == 0
        execute(
            postgres_url,
            f"""INSERT INTO gateways
            SELECT 'x', now, now + 600, now, {protocol}, {protocol}, 'other-host', ''
            FROM (SELECT extract(epoch FROM now()) AS now) clock""",
        )
        assert gateway.start().process.wait(60) == 1
        assert f"{age} version uses the store (host other-host, protocol {protocol}; this one: 1)" in gateway.log
        assert "stop all of those before you start this one" in gateway.log
        execute(postgres_url, "UPDATE gateways SET until = 0")
        gateway.start().wait()


def _names(gateway: Gateway) -> list[str]:
    return [one["name"] for one in gateway.http.get("/admin/windows?limit=100").json()["windows"]]


def _whole(gateway: Gateway, name: str) -> None:
    """A window has all its bytes."""
    verdict = gateway.http.post(f"/admin/windows/{name}/verify").json()
    assert verdict["ok"], verdict
    assert verdict["chunks_usable"] == verdict["chunks_expected"] > 0


def _pinned(gateway: Gateway) -> set[str]:
    """The hashes of the chunks that are pinned on disk, for whomever."""
    pins = gateway.data_dir.parent.parent / "kv-pins"
    return {file.name.split("@")[3] for folder in pins.iterdir() for file in folder.iterdir()}


def _held(gateway: Gateway) -> set[str]:
    """The hashes of the chunks that windows hold."""
    found = [gateway.http.get(f"/admin/windows/{name}?include_blocks=true").json() for name in _names(gateway)]
    return {block["hash"] for window in found for block in window["blocks"]}


def _alive(store_url: str) -> int:
    """How many gateways the store knows."""

    async def count() -> int:
        connection = await asyncpg.connect(store_url)
        try:
            return int(await connection.fetchval("SELECT count(*) FROM gateways"))
        finally:
            await connection.close()

    return asyncio.run(count())
