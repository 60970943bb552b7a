"""Several engines: a session stays with one, and moves when that dies."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.engine_pool import CHAT, Before, all_healthy, chats, members, server_of, shown
from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import eventually
from tests.support.raw_http import RawHttpClient


def test_a_session_stays_with_one_engine_and_sessions_are_spread(engines: list[FakeEngine], before: Before) -> None:
    gateway = before(*engines)
    all_healthy(gateway)
    # Which engine a session is drawn to depends on the ports of this run: go on until each engine has one.
    for number in range(300):
        first = chats(engines)
        for _ in range(3):
            gateway.chat(f"s-{number}")
        grown = [now - was for now, was in zip(chats(engines), first, strict=True)]
        assert sorted(grown) == [0, 0, 3]
        if number >= 12 and all(chats(engines)):
            break
    assert all(chats(engines))


@pytest.mark.anyio
async def test_lineages_are_spread_evenly() -> None:
    async with members("http://one:8000", "http://two:8000", "http://three:8000") as several:
        homes = Counter(several.choose(f"lineage-{number}")[0].url for number in range(600))
    assert sorted(homes) == [member.url for member in sorted(several.members, key=lambda member: member.url)]
    assert min(homes.values()) > 170


def test_a_lineage_stays_together_over_freeze_and_thaw(engines: list[FakeEngine], before: Before) -> None:
    gateway = before(*engines)
    all_healthy(gateway)
    for number in range(4):
        gateway.chat(f"s-{number}")
        home = server_of(gateway, f"s-{number}")
        assert gateway.freeze(f"s-{number}", f"w-{number}").status_code == 201
        for branch in range(3):
            thawed = gateway.http.post(f"/admin/windows/w-{number}/thaw", json={}).json()["session_id"]
            gateway.chat(thawed, f"branch {branch}")
            assert server_of(gateway, thawed) == home


def test_requests_that_are_no_turns_follow_their_session(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
    for engine in engines:
        engine.on_other = lambda exchange: exchange.json({"ok": True})
    gateway = before(*engines)
    all_healthy(gateway)
    gateway.chat(session)
    home = next(engine for engine in engines if engine.seen(CHAT))
    for _ in range(3):
        gateway.http.post("/v1/embeddings", json={"model": MODEL, "input": "x"}, headers={"x-session-id": session})
        gateway.http.get(f"/s/{session}/v1/models/whatever")
    assert [len(engine.seen("/v1/embeddings")) for engine in engines] == [3 * (e is home) for e in engines]
    assert [len(engine.seen("/v1/models/whatever")) for engine in engines] == [3 * (e is home) for e in engines]
    for _ in range(6):
        gateway.http.post("/v1/rerank", json={"model": MODEL, "query": "x"})
    assert [len(engine.seen("/v1/rerank")) for engine in engines] == [2, 2, 2]


def test_fork_goes_to_the_engine_of_its_origin(engines: list[FakeEngine], before: Before, session: str) -> None:
    gateway = before(*engines)
    all_healthy(gateway)
    history: list[dict[str, str]] = [{"role": "user", "content": session}]

    def ask(text: str) -> str:
        asked = [*history, {"role": "user", "content": text}] if text else history
        answer = gateway.http.post(CHAT, json={"model": MODEL, "messages": asked})
        return str(answer.headers["x-session-id"])

    first = ask("")
    drawn_to = next(engine for engine in engines if engine.seen(CHAT))
    gateway.turns(first)
    drawn_to.stop()
    history.append({"role": "assistant", "content": "Hello there!"})
    assert ask("one way") == first
    home = server_of(gateway, first, 2)
    eventually(lambda: shown(gateway)[drawn_to.url]["state"] == "ejected", "the dead one is ejected")
    drawn_to.start()
    all_healthy(gateway)
    fork = ask("another way")
    assert fork != first
    assert server_of(gateway, fork) == home != drawn_to.url


def test_conversation_moves_when_its_engine_dies_and_stays_there(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
    gateway = before(*engines)
    all_healthy(gateway)
    gateway.chat(session)
    home = next(engine for engine in engines if engine.seen(CHAT))
    home.stop()
    answer = gateway.chat(session)
    assert (answer.status_code, answer.headers["x-session-id"]) == (200, session)
    second = server_of(gateway, session, 2)
    assert second != home.url
    assert gateway.http.get(f"/admin/sessions/{session}").json()["engine"] == second
    eventually(lambda: shown(gateway)[home.url]["state"] == "ejected", "the dead one is ejected")
    home.start()
    all_healthy(gateway)
    gateway.chat(session)
    assert server_of(gateway, session, 3) == second  # the KV is there now
    assert gateway.log.count("is ejected") == gateway.log.count("is back") == 1


def test_stream_of_a_dying_engine_ends_with_an_error_event(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
    def dies(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="Hel"))
        exchange.cut()

    for engine in engines:
        engine.on_chat = dies
    gateway = before(*engines)
    with RawHttpClient(gateway.url) as wire:
        wire.chat(session, stream=True)
        assert wire.head() == 200
        text = b"".join(wire.chunks())
    assert b'"code":"engine_unreachable"' in text
    assert text.endswith(DONE)
    assert sum(chats(engines)) == 1
    assert gateway.turns(session)[0]["outcome"] == "engine_cut"


def test_no_request_of_50_is_lost_when_an_engine_is_killed(engines: list[FakeEngine], before: Before) -> None:
    first, *others = engines
    first.on_chat = lambda exchange: None if exchange.gone(30) else pytest.fail("it was not killed")
    gateway = before(*engines)
    all_healthy(gateway)
    with ThreadPoolExecutor(50) as pool:
        answers = [pool.submit(gateway.chat, f"s-{number}") for number in range(50)]
        eventually(lambda: sum(chats(engines)) == 50, "all are on their way")
        held = len(first.seen(CHAT))
        assert held  # of 50 sessions: none once in a thousand million runs, as ports are drawn
        first.stop()
        assert {answer.result().status_code for answer in answers} == {200}
    assert sum(chats(others)) == 50
    assert sum(chats(engines)) == 50 + held


def test_request_that_crashes_engines_is_sent_to_two_at_most(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
    for engine in engines:
        engine.on_chat = Exchange.cut
    gateway = before(*engines)
    all_healthy(gateway)
    answer = gateway.chat(session)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unreachable")
    assert sorted(chats(engines)) == [0, 1, 1]
    assert gateway.turns(session)[0]["engine"] is None


def test_all_engines_dead_is_an_immediate_502(engines: list[FakeEngine], before: Before, session: str) -> None:
    gateway = before(*engines)
    gateway.chat(session)
    for engine in engines:
        engine.stop()

    def refused() -> bool:
        clock = time.monotonic()
        answer = gateway.chat(session)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unreachable")
        assert time.monotonic() - clock < 3
        return gateway.http.get("/readyz").status_code == 503

    eventually(refused, "not ready")
    eventually(lambda: {one["state"] for one in shown(gateway).values()} == {"ejected"}, "all are ejected")
    states = shown(gateway)
    assert all(url in one["last_error"] and one["failures"] >= 3 for url, one in states.items())
    assert gateway.http.get("/admin/health").json()["status"] == "unhealthy"
    assert gateway.http.get("/v1/models").json()["data"] == []
    engines[1].start()
    eventually(lambda: gateway.http.get("/readyz").status_code == 200, "ready with one of three")
    assert gateway.chat(session).status_code == 200
    assert gateway.http.get("/admin/health").json()["components"]["engine"]["status"] == "degraded"
