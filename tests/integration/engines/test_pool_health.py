"""Engines that are dead, slow or unhealthy: which one is asked, and when it is tried again."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.errors import GatewayError
from tests.support.engine_pool import CHAT, Before, all_healthy, chats, members, server_of, shown
from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, chunk_event, delta, event, usage_of
from tests.support.gateway_process import Gateway, eventually, not_accepting

MANY = 40  # sessions: of three engines one gets none of them once in three million times, as ports are drawn


def serving(*models: str, root: str = "org/demo") -> Callable[[Exchange], None]:
    """An `on_models` that lists these."""
    cards = [{"id": name, "object": "model", "root": root, "parent": None, "max_model_len": 4096} for name in models]
    return lambda exchange: exchange.json({"object": "list", "data": cards})


def test_engine_dead_from_the_start_delays_no_request(engines: list[FakeEngine], before: Before) -> None:
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


def test_engine_slow_to_connect_delays_no_other_request(engines: list[FakeEngine], before: Before) -> None:
    with not_accepting() as slow:
        gateway = before(slow, *engines, connect_timeout_s=8)
        clock = time.monotonic()
        for number in range(12):
            assert gateway.chat(f"s-{number}").status_code == 200
        assert time.monotonic() - clock < 7


def test_ejected_engine_that_fails_slowly_is_not_tried(before: Before, tmp_path: Path) -> None:
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


def test_unhealthy_engine_is_ejected_until_it_is_healthy(engines: list[FakeEngine], before: Before) -> None:
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


def test_unresponsive_engine_opens_its_circuit_until_a_trial(engines: list[FakeEngine], before: Before) -> None:
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


def test_503_is_retried_on_a_healthy_engine_or_forwarded(engines: list[FakeEngine], before: Before) -> None:
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
def test_any_other_status_is_forwarded_and_not_retried(
    engines: list[FakeEngine], before: Before, session: str, status: int
) -> None:
    for engine in engines:
        engine.on_chat = lambda exchange: exchange.json({"error": {"message": "so it is"}}, status)
    gateway = before(*engines)
    answer = gateway.chat(session)
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": "so it is"}})
    assert sum(chats(engines)) == 1


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


def test_model_that_no_engine_serves_is_left_to_an_engine(engines: list[FakeEngine], before: Before) -> None:
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


def test_list_of_models_of_one_engine_is_forwarded_unchanged(engines: list[FakeEngine], before: Before) -> None:
    engines[0].on_models = lambda exchange: exchange.json({"data": [{"id": MODEL}], "odd": [1.50]})
    gateway = before(engines[0])
    assert gateway.http.get("/v1/models").content == b'{"data":[{"id":"demo"}],"odd":[1.5]}'


def test_one_name_for_two_models_is_logged_and_in_health(engines: list[FakeEngine], before: Before) -> None:
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


def test_unreadable_list_of_models_is_reported(engines: list[FakeEngine], before: Before) -> None:
    engines[1].on_models = lambda exchange: exchange.json({"data": [{"name": "x"}]})
    gateway = before(*engines[:2])
    assert "list of models that cannot be read" in shown(gateway)[engines[1].url]["last_error"]
    assert gateway.chat("s").status_code == 200


def test_fingerprint_of_a_hidden_usage_event_is_per_engine(engines: list[FakeEngine], before: Before) -> None:
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


@pytest.mark.anyio
async def test_choosing(engines: list[FakeEngine]) -> None:
    urls = [engine.url for engine in engines]
    async with members(*urls) as several:
        await several.probe()
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
            await fewer.probe()
            assert all(fewer.choose(n)[0].url == homes[n] for n in names if homes[n] != urls[2])
        gone = next(engine for engine in engines if engine.url == order[0])
        gone.stop()
        with pytest.raises(GatewayError, match=gone.url):
            await several.members[urls.index(gone.url)].engine.check()
        several.choose("lineage")[0].unanswered("refused")
        assert several.choose("lineage", prefer=gone.url)[0].url == gone.url  # one failure says little


@pytest.mark.anyio
async def test_choosing_from_one_engine_is_cheap(engines: list[FakeEngine]) -> None:
    async with members(engines[0].url) as one:
        clock = time.perf_counter()
        for _ in range(10_000):
            one.choose("lineage", "http://x", "model")
        assert (time.perf_counter() - clock) / 10_000 < 50e-6


@pytest.mark.anyio
async def test_own_request_is_retried_on_another_engine(engines: list[FakeEngine]) -> None:
    async with members(*(engine.url for engine in engines)) as several:
        await several.probe()
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


def waiting(number: int, finished: int) -> str:
    """Metrics of an engine at which so many requests wait, and so many have ended."""
    return f"vllm:num_requests_waiting {number}\nvllm:request_success_total {finished}\n"


@pytest.mark.anyio
async def test_a_turn_leaves_its_engine_only_if_waiting_costs_more_than_loading(engines: list[FakeEngine]) -> None:
    async with members(*(engine.url for engine in engines)) as several:
        await several.probe()
        several.load_s = lambda _cache, tokens: tokens / 1000
        home, second, third = several.choose("lineage")
        now = time.monotonic()
        home.queue.read(waiting(10, 0), now - 4)
        home.queue.read(waiting(10, 1), now)
        assert home.queue.wait_s() == pytest.approx(40)
        assert several.place("lineage", home.url, tokens=40_000) is home
        assert several.place("lineage", home.url, tokens=38_000) is second
        second.queue.read(waiting(20, 0), now - 4)
        second.queue.read(waiting(20, 1), now)
        assert several.place("lineage", home.url, tokens=0) is third
        third.drained = True
        assert several.place("lineage", home.url, tokens=0) is home, "no engine that is drained, none that is busier"
        # What was prepared for one engine is sent there.
        third.drained = False
        assert several.route("lineage", home.url, placed=second)._members[0] is second
        assert several.route("lineage", home.url)._members[0] is third
        assert several.choose("lineage", home.url)[0] is home, "the gateway's own requests do not move"
        home.queue.read(waiting(0, 9), time.monotonic())
        assert several.place("lineage", home.url, tokens=0) is home


@pytest.mark.anyio
async def test_not_every_turn_follows_the_first_that_left(engines: list[FakeEngine]) -> None:
    async with members(*(engine.url for engine in engines[:2])) as several:
        await several.probe()
        home, other = several.choose("lineage")
        now = time.monotonic()
        for member, queued in ((home, 10), (other, 0)):
            member.queue.read(waiting(queued, 0), now - 4)
            member.queue.read(waiting(queued, 4), now)
        went = [several.place("lineage", home.url) for _ in range(30)]
        assert went[0] is other
        assert went[-1] is home
        assert 5 < went.count(other) < 15
