"""Several nodes, each an engine with a cache: where KV is loaded, deleted and found, and how broken ones are seen."""

from pathlib import Path

from tests.support.engine_pool import CHAT, server_of
from tests.support.fakes.engine import MODEL, Exchange
from tests.support.fakes.lmcache import CHUNK
from tests.support.gateway_process import eventually, gateway_in_front_of
from tests.support.node_pairs import Pair, Start, beside, component, entries, evict, frozen, loaded_at, pairs, states

SESSIONS = [f"s-{number}" for number in range(6)]


def test_kv_is_loaded_into_the_cache_of_the_engine_that_gets_the_turn(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    used = set()
    for session in SESSIONS:
        window = frozen(gateway, session)
        evict(gateway, window)
        before = loaded_at(nodes)
        thawed = gateway.http.post(f"/admin/windows/{window}/thaw", json={"warm": "cpu"}).json()
        assert thawed["receipt"]["chunks_prefetched"] == thawed["receipt"]["chunks_expected"]
        (node,) = (pair for pair, then in zip(nodes, before, strict=True) if len(pair.cache.prefetches) > then)
        assert gateway.chat(thawed["session_id"], "and then?").status_code == 200
        assert server_of(gateway, thawed["session_id"]) == node.engine.url
        used.add(node.engine.url)
        # The frozen session goes on where it was, and is loaded there.
        home = beside(nodes, server_of(gateway, session))
        evict(gateway, window)
        then = len(home.cache.prefetches)
        assert gateway.chat(session, "hello there, how are you?").status_code == 200
        assert server_of(gateway, session, 2) == home.engine.url
        assert len(home.cache.prefetches) == then + 1
    assert len(used) == 2, "of six lineages both nodes get some"


def test_pairs_are_proved_and_memory_is_told_and_emptied_on_every_node(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
    assert [(c["status"], c["message"]) for c in checks if c["name"] == "pairing"] == [
        ("ok", f"{p.engine.url}: what it computed came into the memory of {p.cache.url}") for p in nodes
    ]
    assert component(gateway, "cache")["status"] == "healthy"
    window = frozen(gateway, "s")
    prefetched = gateway.http.post(f"/admin/windows/{window}/prefetch", json={}).json()
    home = next(pair for pair in nodes if pair.cache.url == prefetched["cache_url"])
    other = next(pair for pair in nodes if pair is not home)
    objects = prefetched["tiers"]["cpu"]["present"]
    other.cache.memory.update(home.cache.memory)
    status = gateway.http.get(f"/admin/windows/{window}").json()
    assert status["caches"] == {home.cache.url: True, other.cache.url: None}
    assert status["kv_cache"]["tiers"]["cpu"]["present"] == objects
    shown = gateway.http.get("/admin/cache").json()
    by_url = {one["url"]: one for one in shown["nodes"]}
    assert {url: one["engines"] for url, one in by_url.items()} == {p.cache.url: [p.engine.url] for p in nodes}
    assert shown["tiers"]["cpu"]["objects"] == sum(one["memory"]["objects"] for one in by_url.values())
    evicted = evict(gateway, window)
    assert evicted["caches"] == {p.cache.url: {"before": objects, "after": 0} for p in nodes}
    assert evicted["tiers"]["cpu"] == {"before": 2 * objects, "after": 0}
    assert gateway.http.get(f"/admin/windows/{window}").json()["caches"] == {p.cache.url: False for p in nodes}
    nodes[1].cache.stop()
    with_one_down = evict(gateway, window)
    assert list(with_one_down["caches"]) == [nodes[0].cache.url]
    assert any(nodes[1].cache.url in warning for warning in with_one_down["warnings"])


def test_a_deletion_is_told_to_every_cache_in_memory_and_tiers(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    window = frozen(gateway, "s")
    gateway.http.delete("/admin/sessions/s")
    for pair in nodes:
        pair.cache.deletions.clear()

    def hang_up(method: str, _path: str) -> None:
        if method == "DELETE":
            raise ConnectionError

    nodes[0].cache.before_answer = hang_up
    answer = gateway.http.delete(f"/admin/windows/{window}").json()
    assert any(nodes[0].cache.url in warning for warning in answer["warnings"])
    assert ("all", "fs") in nodes[1].cache.deletions
    assert not list(nodes[0].cache.folder.glob("*.data"))


def test_a_pair_that_is_configured_wrongly_is_failed_and_the_proved_one_used(start: Start, nodes: list[Pair]) -> None:
    crossed = [pair.cache for pair in reversed(nodes)]
    gateway = start(entries(nodes, crossed))
    for pair, configured in zip(nodes, crossed, strict=True):
        problem = f"into the memory of {pair.cache.url}, not of {configured.url} as configured"
        eventually(lambda: problem in component(gateway, "cache")["message"], "health says so")  # noqa: B023 - at once
    assert component(gateway, "cache")["status"] == "degraded"
    doctor = gateway.http.post("/admin/doctor", json={}).json()
    failed = [check for check in doctor["checks"] if check["status"] == "failed"]
    assert [check["name"] for check in failed] == ["pairing", "pairing"]
    remedy = f"set its cache_url to {nodes[0].cache.url}, or correct the engine: lmcache.mp.host"
    assert failed[0]["remedy"].startswith(remedy)
    assert component(gateway, "isolation")["status"] == "healthy"
    window = frozen(gateway, "s")
    evict(gateway, window)
    before = loaded_at(nodes)
    thawed = gateway.http.post(f"/admin/windows/{window}/thaw", json={"warm": "cpu"}).json()
    gateway.chat(thawed["session_id"], "and then?")
    home = beside(nodes, server_of(gateway, thawed["session_id"]))
    assert len(home.cache.prefetches) == before[nodes.index(home)] + 1


def test_an_engine_whose_cache_is_gone_comes_after_the_others_and_nothing_is_lost(
    start: Start, nodes: list[Pair]
) -> None:
    gateway = start()
    window = frozen(gateway, "s")
    home = beside(nodes, server_of(gateway, "s"))
    other = next(pair for pair in nodes if pair is not home)
    home.cache.stop()
    eventually(lambda: "comes after the others" in gateway.log, "it is seen")
    cache = component(gateway, "cache")
    assert cache["status"] == "degraded"
    assert {one["url"]: one["status"] for one in cache["caches"]} == {
        home.cache.url: "unhealthy",
        other.cache.url: "healthy",
    }
    assert f"cache {home.cache.url}: " in cache["message"]
    assert gateway.chat("s", "hello there, how are you?").status_code == 200
    assert server_of(gateway, "s", 2) == other.engine.url
    assert other.cache.prefetches, "its KV was loaded there"
    assert gateway.freeze("s", "again").json()["kv"] == "complete"
    assert gateway.http.post(f"/admin/windows/{window}/thaw", json={"warm": "gpu"}).status_code == 200
    home.restart_cache()
    eventually(lambda: "is of use again" in gateway.log, "it is back")
    assert component(gateway, "cache")["status"] == "healthy"


def test_a_cache_that_comes_back_with_another_chunk_size_is_left_out_by_name(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    window = frozen(gateway, "s")
    odd, good = nodes
    odd.restart_cache(chunk=2 * CHUNK)
    eventually(lambda: "is left out" in gateway.log, "it is seen")
    cache = component(gateway, "cache")
    assert cache["status"] == "degraded"
    assert {one["url"]: one["status"] for one in cache["caches"]}[odd.cache.url] == "left out"
    assert f"start it with --chunk-size {CHUNK}" in cache["message"]
    for number in range(6):  # nothing is computed where it would be stored under other names
        assert gateway.chat(f"later-{number}", "hello there, how are you?").status_code == 200
        assert server_of(gateway, f"later-{number}") == good.engine.url
    thawed = gateway.http.post(f"/admin/windows/{window}/thaw", json={"warm": "cpu"}).json()
    assert thawed["receipt"]["chunks_prefetched"] == thawed["receipt"]["chunks_expected"]
    assert odd.cache.prefetches == []
    odd.restart_cache()
    eventually(lambda: "is like the others again" in gateway.log, "it is back")


def test_an_engine_that_comes_back_with_another_model_path_gets_nothing_while_others_are_right(tmp_path: Path) -> None:
    with pairs(tmp_path, 3) as nodes:
        given = {"engines": entries(nodes), "kv_dir": tmp_path / "kv", "engine_check_s": 0.2}
        with gateway_in_front_of("", tmp_path, **given) as gateway:
            frozen(gateway, "s")
            wrong = nodes[0].engine
            card = {"id": MODEL, "object": "model", "root": "/elsewhere", "parent": None, "max_model_len": 4096}
            wrong.on_models = lambda exchange: exchange.json({"object": "list", "data": [card]})
            eventually(lambda: "is not the same on all engines" in gateway.log, "it is seen")
            assert component(gateway, "engine")["models_differ"][MODEL][wrong.url] == "/elsewhere"
            had = len(wrong.seen(CHAT))
            for number in range(8):
                gateway.chat(f"later-{number}")
            assert len(wrong.seen(CHAT)) == had
            thawed = gateway.http.post("/admin/windows/w-s/thaw", json={"warm": "gpu"})
            assert thawed.status_code == 200, "the model is what most engines serve"


def test_a_session_whose_engine_vanishes_in_a_stream_goes_on_at_the_other_node(start: Start, nodes: list[Pair]) -> None:
    gateway = start()
    window = frozen(gateway, "s")
    home = beside(nodes, server_of(gateway, "s"))
    other = next(pair for pair in nodes if pair is not home)

    def vanish(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(b'data: {"id":"1","object":"chat.completion.chunk","choices":[]}\n\n')
        exchange.cut()

    home.engine.on_chat = vanish
    assert "error" in gateway.chat("s", "hello there, how are you?", stream=True).text
    home.engine.stop()
    home.cache.stop()
    eventually(lambda: states(gateway)[home.engine.url] == "ejected", "it is seen")
    assert gateway.chat("s", "hello there, how are you?").status_code == 200
    assert server_of(gateway, "s", 3) == other.engine.url
    assert gateway.freeze("s", "again").json()["kv"] == "complete"
    receipt = gateway.http.post(f"/admin/windows/{window}/thaw", json={"warm": "cpu"}).json()["receipt"]
    assert receipt["chunks_prefetched"] == receipt["chunks_expected"]


def test_engines_of_one_cache_come_before_those_of_another_node(tmp_path: Path) -> None:
    """Three engines of one node and one of another: a session that loses its engine stays at the node."""
    with pairs(tmp_path, 4) as nodes:
        shared = nodes[0].cache
        for pair in nodes[:3]:
            shared.behind(pair.engine)
        caches = [shared] * 3 + [nodes[3].cache]
        given = {"engines": entries(nodes, caches), "kv_dir": tmp_path / "kv", "engine_check_s": 0.2}
        with gateway_in_front_of("", tmp_path, **given) as gateway:
            eventually(lambda: set(states(gateway).values()) == {"healthy"}, "all are healthy")
            names = [name for name in SESSIONS if gateway.chat(name).status_code == 200]
            at_node = [name for name in names if server_of(gateway, name) != nodes[3].engine.url]
            lost = beside(nodes, server_of(gateway, at_node[0]))
            lost.engine.stop()
            eventually(lambda: states(gateway)[lost.engine.url] == "ejected", "it is seen")
            for name in at_node:
                gateway.chat(name)
                assert server_of(gateway, name, 2) != nodes[3].engine.url
