"""Several engines: who gets a request, who gets it next, and what a client sees when one of them dies."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.engines.client import HttpEngineClient
from gateway.engines.connection_pool import Upstream
from gateway.engines.node import EngineNode
from gateway.engines.pool import EnginePool
from gateway.errors import GatewayError
from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, chunk_event, delta, event, usage_of
from tests.support.gateway_process import Gateway, eventually, gateway_in_front_of, not_accepting
from tests.support.raw_http import RawHttpClient

CHAT = "/v1/chat/completions"
MANY = 40  # sessions: of three engines one gets none of them once in three million times, as ports are drawn
Before = Callable[..., Gateway]


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    """Three of them; a test that stops one starts it again or leaves it."""
    started = [FakeEngine().start() for _ in range(3)]
    yield started
    for engine in started:
        if engine.listening:
            engine.stop()


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Before]:
    """Starts a gateway before some engines, ready, looking at them often."""
    with ExitStack() as stack:

        def start(*engines: FakeEngine | str, **settings: object) -> Gateway:
            urls = ",".join(engine if isinstance(engine, str) else engine.url for engine in engines)
            return stack.enter_context(gateway_in_front_of(urls, tmp_path, **{"engine_check_s": 0.2, **settings}))

        yield start


def chats(engines: Sequence[FakeEngine]) -> list[int]:
    """How many chat completions each engine has seen."""
    return [len(engine.seen(CHAT)) for engine in engines]


def server_of(gateway: Gateway, session: str, count: int = 1) -> str:
    """The engine that served a session's last turn, by its own record."""
    return str(gateway.turns(session, count)[0]["engine"])


def shown(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """What health shows of each engine."""
    component = gateway.http.get("/admin/health?component=engine").json()["components"]["engine"]
    return {one["url"]: one for one in component["engines"]}


def all_healthy(gateway: Gateway) -> None:
    """Wait until every engine has been looked at."""
    eventually(lambda: all(one["state"] == "healthy" for one in shown(gateway).values()), "all are healthy")


def serving(*models: str, root: str = "org/demo") -> Callable[[Exchange], None]:
    """An `on_models` that lists these."""
    cards = [{"id": name, "object": "model", "root": root, "parent": None, "max_model_len": 4096} for name in models]
    return lambda exchange: exchange.json({"object": "list", "data": cards})


# --- affinity


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


def test_what_is_no_turn_follows_its_session_and_is_spread_without_one(
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


def test_a_fork_goes_where_the_cache_of_what_it_shares_is(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
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


# --- an engine dies


def test_a_conversation_goes_on_elsewhere_when_its_engine_dies_and_stays_there(
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


def test_a_stream_whose_engine_dies_ends_with_an_error_event_and_is_not_sent_again(
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


def test_of_50_requests_none_is_lost_when_an_engine_is_killed_under_them(
    engines: list[FakeEngine], before: Before
) -> None:
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


def test_a_request_that_kills_what_it_is_sent_to_is_sent_to_two_engines_at_most(
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


def test_with_all_engines_dead_the_answer_is_a_502_at_once_and_comes_back_with_them(
    engines: list[FakeEngine], before: Before, session: str
) -> None:
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


def test_an_engine_that_is_dead_from_the_start_keeps_nobody_waiting(engines: list[FakeEngine], before: Before) -> None:
    dead, *others = engines
    dead.stop()
    gateway = before(*engines)
    for number in range(12):
        assert gateway.chat(f"s-{number}").status_code == 200
    assert gateway.freeze("s-0", "kept").status_code == 201
    assert gateway.http.post("/admin/windows/kept/thaw", json={"warm": "gpu"}).status_code == 200
    assert sum(chats(others)) == 12
    doctor = gateway.http.post("/admin/doctor", json={}).json()
    failed = [check["message"] for check in doctor["checks"] if check["status"] == "failed"]
    assert len(failed) == 1
    assert dead.url in failed[0]
    assert gateway.http.get("/readyz").status_code == 200


def test_an_engine_that_is_slow_to_connect_delays_nobody_else(engines: list[FakeEngine], before: Before) -> None:
    with not_accepting() as slow:
        gateway = before(slow, *engines, connect_timeout_s=8)
        clock = time.monotonic()
        for number in range(12):
            assert gateway.chat(f"s-{number}").status_code == 200
        assert time.monotonic() - clock < 7


def test_an_engine_that_is_slow_to_fail_is_not_tried_any_more_once_it_is_ejected(
    before: Before, tmp_path: Path
) -> None:
    with not_accepting() as slow:
        gateway = Gateway(tmp_path, slow, connect_timeout_s=1.1, engine_check_s=0.1)
        try:
            gateway.start().wait("/healthz")
            eventually(lambda: "is ejected" in gateway.log, "ejected", within=30)
            clock = time.monotonic()
            assert gateway.http.get("/v1/models/whatever").json()["error"]["code"] == "engine_unreachable"
            assert time.monotonic() - clock < 1
        finally:
            gateway.close()


# --- an engine is not well


def test_an_engine_whose_health_is_bad_is_ejected_and_returns_when_it_is_good(
    engines: list[FakeEngine], before: Before
) -> None:
    sick, *_ = engines
    gateway = before(*engines)
    all_healthy(gateway)
    homes = [f"s-{number}" for number in range(MANY)]
    for name in homes:
        gateway.chat(name)
    assert (had := len(sick.seen(CHAT)))
    sick.on_health = lambda exchange: exchange.json({}, 503)
    eventually(lambda: shown(gateway)[sick.url]["state"] == "ejected", "ejected")
    assert "answered 503 to /health" in shown(gateway)[sick.url]["last_error"]
    for name in homes:
        gateway.chat(name)
    assert len(sick.seen(CHAT)) == had
    sick.on_health = lambda exchange: exchange.json({})
    all_healthy(gateway)
    for number in range(MANY):
        gateway.chat(f"later-{number}")
    assert len(sick.seen(CHAT)) > had


def test_an_engine_that_leaves_requests_unanswered_rests_and_comes_back_through_a_trial(
    engines: list[FakeEngine], before: Before
) -> None:
    bad, *_ = engines
    gateway = before(*engines)
    all_healthy(gateway)
    bad.on_chat = Exchange.cut
    for number in range(60):
        assert gateway.chat(f"s-{number}").status_code == 200
    assert shown(gateway)[bad.url]["state"] == "resting"
    assert shown(gateway)[bad.url]["failures"] == len(bad.seen(CHAT)) < 8
    assert gateway.http.get("/admin/health").json()["components"]["engine"]["status"] == "degraded"
    bad.on_chat = bad.answer_chat
    numbers = iter(range(60, 10**6))

    def healed() -> bool:
        assert gateway.chat(f"s-{next(numbers)}").status_code == 200
        return shown(gateway)[bad.url]["state"] == "healthy"

    eventually(healed, "a trial was answered", within=30)


def test_a_503_goes_on_to_an_engine_that_is_well_and_passes_untouched_where_there_is_none(
    engines: list[FakeEngine], before: Before
) -> None:
    first, second, third = engines
    gateway = before(*engines)
    all_healthy(gateway)
    busy: Callable[[Exchange], None] = lambda exchange: exchange.json(  # noqa: E731 - one body for three
        {"error": {"message": "queue is full"}}, 503, ["retry-after: 7"]
    )
    first.on_chat = second.on_chat = busy
    for number in range(8):
        assert gateway.chat(f"s-{number}").status_code == 200
    third.on_chat = busy
    answer = gateway.chat("s-0")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json() == {"error": {"message": "queue is full"}}


@pytest.mark.parametrize("status", [400, 404, 429, 500, 502])
def test_any_other_answer_passes_and_goes_nowhere_else(
    engines: list[FakeEngine], before: Before, session: str, status: int
) -> None:
    for engine in engines:
        engine.on_chat = lambda exchange: exchange.json({"error": {"message": "so it is"}}, status)
    gateway = before(*engines)
    answer = gateway.chat(session)
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": "so it is"}})
    assert sum(chats(engines)) == 1


# --- what they serve


def test_a_request_goes_to_an_engine_that_serves_its_model_and_the_list_is_of_all(
    engines: list[FakeEngine], before: Before
) -> None:
    first, second, third = engines
    first.on_models = serving("a", "shared")
    second.on_models = serving("b", "shared")
    third.on_models = serving("b")
    gateway = before(*engines)
    all_healthy(gateway)
    assert [card["id"] for card in gateway.http.get("/v1/models").json()["data"]] == ["a", "shared", "b"]
    for number in range(6):
        gateway.chat(f"a-{number}", model="a")
    assert chats(engines) == [6, 0, 0]
    for number in range(MANY):
        gateway.chat(f"b-{number}", model="b")
    assert chats(engines)[0] == 6
    assert min(chats(engines)[1:]) >= 1
    for _ in range(12):
        gateway.http.post("/v1/completions", json={"model": "shared", "prompt": [1]})
    assert [len(engine.seen("/v1/completions")) > 0 for engine in (first, second)] == [True, True]
    third_saw = [r for r in third.seen("/v1/completions") if r.json["model"] == "shared"]
    assert third_saw == []


def test_a_model_that_nobody_serves_is_for_an_engine_to_refuse(engines: list[FakeEngine], before: Before) -> None:
    for engine in engines:
        engine.on_chat = lambda exchange: exchange.json({"error": {"message": "no such model"}}, 404)
    gateway = before(*engines)
    assert gateway.chat("s", model="nobody's").json() == {"error": {"message": "no such model"}}


def test_a_model_whose_engine_is_dead_is_a_502_not_a_404_of_another(engines: list[FakeEngine], before: Before) -> None:
    first, second, _ = engines
    first.on_models = serving("a")
    gateway = before(first, second)
    all_healthy(gateway)
    first.stop()
    answer = gateway.chat("s", model="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_unreachable")
    assert first.url in answer.json()["error"]["message"]
    assert chats([second]) == [0]


def test_with_one_engine_the_list_of_models_passes_byte_for_byte(engines: list[FakeEngine], before: Before) -> None:
    engines[0].on_models = lambda exchange: exchange.json({"data": [{"id": MODEL}], "odd": [1.50]})
    gateway = before(engines[0])
    assert gateway.http.get("/v1/models").content == b'{"data":[{"id":"demo"}],"odd":[1.5]}'


def test_one_name_for_two_models_is_told_in_log_and_health(engines: list[FakeEngine], before: Before) -> None:
    first, second, _ = engines
    second.on_models = serving(MODEL, root="org/other")
    gateway = before(first, second)
    all_healthy(gateway)
    component = gateway.http.get("/admin/health?component=engine").json()["components"]["engine"]
    assert component["status"] == "degraded"
    assert component["models_differ"] == {MODEL: {first.url: "org/demo", second.url: "org/other"}}
    assert "'demo' is not the same on all engines" in gateway.log
    second.on_models = first.on_models
    eventually(lambda: gateway.http.get("/admin/health").json()["components"]["engine"]["status"] == "healthy", "same")


def test_a_list_of_models_that_cannot_be_read_is_a_failure_that_says_so(
    engines: list[FakeEngine], before: Before
) -> None:
    engines[1].on_models = lambda exchange: exchange.json({"data": [{"name": "x"}]})
    gateway = before(*engines[:2])
    assert "list of models that cannot be read" in shown(gateway)[engines[1].url]["last_error"]
    assert gateway.chat("s").status_code == 200


# --- hidden usage


def test_the_stamp_of_a_hidden_usage_event_is_each_engines_own(engines: list[FakeEngine], before: Before) -> None:
    def stamping(stamp: str) -> Callable[[Exchange], None]:
        def answer(exchange: Exchange) -> None:
            exchange.begin()
            exchange.chunk(delta(content="Hello"))
            exchange.chunk(chunk_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
            head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [], "usage": usage_of(1, 1)}
            exchange.chunk(event({**head, "system_fingerprint": stamp} if stamp else head))
            exchange.chunk(DONE)
            exchange.end()

        return answer

    stamps = ["one", "two", ""]
    for engine, stamp in zip(engines, stamps, strict=True):
        engine.on_chat = stamping(stamp)
    gateway = before(*engines)
    all_healthy(gateway)
    urls = {engine.url: stamp for engine, stamp in zip(engines, stamps, strict=True)}
    seen = set()
    for number in range(MANY):
        text = gateway.chat(f"s-{number}", stream=True).text
        stamp = urls[server_of(gateway, f"s-{number}")]
        seen.add(stamp)
        assert text.count("system_fingerprint") == bool(stamp)
        assert not stamp or f'"finish_reason":"stop"}}],"system_fingerprint":"{stamp}"}}' in text.replace(" ", "")
    assert seen == set(stamps)


# --- choosing, without a gateway


@asynccontextmanager
async def members(*urls: str) -> AsyncIterator[EnginePool]:
    """Engines that nobody looks at but the test."""
    made = [
        EngineNode(
            Upstream(url, connect_timeout_s=1, silence_timeout_s=1),
            HttpEngineClient(url, api_key="", fingerprint="", connect_timeout_s=1, timeout_s=1),
        )
        for url in urls
    ]
    yield EnginePool(made, 5)
    for member in made:
        await member.close()


@pytest.mark.anyio
async def test_choosing(engines: list[FakeEngine]) -> None:
    urls = [engine.url for engine in engines]
    async with members(*urls) as several:
        await several.look()
        order = [member.url for member in several.choose("lineage")]
        assert sorted(order) == sorted(urls)
        assert [m.url for m in several.choose("lineage")] == order
        assert [m.url for m in several.choose("lineage", prefer=order[2])] == [order[2], order[0], order[1]]
        assert [m.url for m in several.choose("lineage", prefer="http://gone:1")] == order
        assert {several.any().url for _ in range(3)} == set(urls)
        # When an engine goes, only its own lineages move.
        names = [f"lineage-{n}" for n in range(60)]
        homes = {name: several.choose(name)[0].url for name in names}
        async with members(*urls[:2]) as fewer:
            await fewer.look()
            assert all(fewer.choose(n)[0].url == homes[n] for n in names if homes[n] != urls[2])
        gone = next(engine for engine in engines if engine.url == order[0])
        gone.stop()
        with pytest.raises(GatewayError, match=gone.url):
            await several.members[urls.index(gone.url)].engine.check()
        several.choose("lineage")[0].unanswered("refused")
        assert several.choose("lineage", prefer=gone.url)[0].url == gone.url  # one failure says little


@pytest.mark.anyio
async def test_with_one_engine_choosing_costs_next_to_nothing(engines: list[FakeEngine]) -> None:
    async with members(engines[0].url) as one:
        clock = time.perf_counter()
        for _ in range(10_000):
            one.choose("lineage", "http://x", "model")
        assert (time.perf_counter() - clock) / 10_000 < 50e-6


@pytest.mark.anyio
async def test_a_question_of_our_own_is_put_to_another_engine_when_the_first_is_dead(
    engines: list[FakeEngine],
) -> None:
    async with members(*(engine.url for engine in engines)) as several:
        await several.look()
        home = several.choose("lineage")[0]
        next(engine for engine in engines if engine.url == home.url).stop()
        assert await several.for_lineage("lineage").tokenize(MODEL, "abc") == [97, 98, 99]
        assert home.breaker.failures == 1
        for engine in engines:
            if engine.listening:
                engine.stop()
        with pytest.raises(GatewayError) as caught:
            await several.tokenize(MODEL, "abc")
        assert caught.value.code == "engine_unreachable"
