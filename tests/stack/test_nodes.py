"""Two nodes, each with a vLLM and an LMCache, over tiers that both share: what one has frozen the other finds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.stack import local
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse, until
from tests.support.second_node import pair_settings, second_node

pytestmark = pytest.mark.stack

NEXT = {"role": "user", "content": "Are you still there?"}


@pytest.fixture(scope="module")
def other(stack: Stack) -> Iterator[local.Plan]:
    """The second node."""
    with second_node(stack.plan) as (plan, _):
        yield plan


def gateway_of(stack: Stack, folder: Path, engines: str) -> Gateway:
    """A gateway in front of both nodes."""
    settings = stack.settings(folder / "data", CWG_ENGINES=engines, CWG_ENGINE_CHECK_S="0.5")
    for short in ("CWG_ENGINE_URLS", "CWG_CACHE_URL"):
        del settings[short]
    folder.mkdir(parents=True, exist_ok=True)
    return Gateway(settings, folder / "gateway.log").start()


@pytest.fixture(scope="module")
def gateway(stack: Stack, other: local.Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of both nodes."""
    gateway = gateway_of(stack, tmp_path_factory.mktemp("nodes"), pair_settings(stack.plan, other))
    yield gateway
    gateway.close()


def pairings(gateway: Gateway) -> list[tuple[str, str]]:
    """What the self-test has found out about each engine's cache."""
    checks = gateway.http.post("/admin/doctor", json={}).json()["checks"]
    return [(check["status"], check["message"]) for check in checks if check["name"] == "pairing"]


def engine_of(gateway: Gateway, session: str) -> str:
    """The engine that served a session last."""
    return str(gateway.http.get(f"/admin/sessions/{session}").json()["engine"])


def drain(gateway: Gateway, engine: str, **more: Any) -> dict[str, Any]:
    """One call of a drain."""
    answer = gateway.http.post("/admin/engines/drain", json={"engine": engine, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_which_cache_is_whose_is_proved_and_a_crossed_pair_is_contradicted(
    stack: Stack, other: local.Plan, gateway: Gateway, tmp_path: Path
) -> None:
    both = (stack.plan, other)
    found = {plan.engine_url: f"what it computed came into the memory of {plan.cache_url}" for plan in both}
    assert pairings(gateway) == [("ok", f"{url}: {message}") for url, message in found.items()]
    crossed = [
        {"url": one.engine_url, "cache_url": two.cache_url} for one, two in zip(both, reversed(both), strict=True)
    ]
    wrong = gateway_of(stack, tmp_path, json.dumps(crossed))
    try:
        for status, message in pairings(wrong):
            assert status == "failed"
            assert message.partition(": ")[2].startswith(found[message.partition(": ")[0]])
    finally:
        wrong.close()


def test_a_window_of_one_node_thaws_on_the_other_with_every_whole_chunk(gateway: Gateway, other: local.Plan) -> None:
    converse(gateway.client("one"), "of two nodes", turns=2)
    home = engine_of(gateway, "one")
    window = gateway.freeze("one", "of-one-node")
    assert window["kv"] == "complete"
    drain(gateway, home)
    evicted = gateway.http.post("/admin/windows/of-one-node/evict", json={}).json()
    assert len(evicted["caches"]) == 2
    thawed = gateway.thaw("of-one-node", warm="gpu")
    receipt = thawed["receipt"]
    assert receipt["chunks_prefetched"] == receipt["chunks_found"] == window["receipt"]["chunks"] > 2
    assert receipt["cached_tokens"] == window["receipt"]["chunks"] * window["receipt"]["chunk_size"]
    reply = chat(gateway.client(thawed["session_id"]), [NEXT])
    assert reply.usage.prompt_tokens_details.cached_tokens >= receipt["cached_tokens"]
    assert engine_of(gateway, thawed["session_id"]) != home
    drain(gateway, home, undo=True)


def test_sessions_of_a_drained_engine_go_on_at_the_other_with_their_kv(gateway: Gateway) -> None:
    messages = converse(gateway.client("moves"), "moves away", turns=2)
    home = engine_of(gateway, "moves")
    done = drain(gateway, home)
    (moved,) = (one for one in done["moved"] if one["session_id"] == "moves")
    assert moved["engine"] not in ("", home)
    window = gateway.http.get(f"/admin/windows/{moved['window_name']}").json()
    assert moved["chunks_loaded"] == window["receipt"]["chunks"] > 2
    until(lambda: drain(gateway, home)["empty"], "it is empty")
    reply = chat(gateway.client("moves"), [*messages, NEXT])
    least = window["receipt"]["chunks"] * window["receipt"]["chunk_size"]
    assert reply.usage.prompt_tokens_details.cached_tokens >= least
    assert engine_of(gateway, "moves") == moved["engine"]
    drain(gateway, home, undo=True)


def test_a_deletion_on_one_node_is_one_on_both(gateway: Gateway, stack: Stack) -> None:
    before = {path.name for path in stack.kv_dir.iterdir()}
    converse(gateway.client("gone"), "goes away", turns=2)
    window = gateway.freeze("gone", "goes-away")
    gateway.http.delete("/admin/sessions/gone").raise_for_status()
    deleted = gateway.http.delete("/admin/windows/goes-away").json()
    assert (deleted["warnings"], deleted["blocks_deleted"]) == ([], window["receipt"]["chunks"])
    assert {path.name for path in stack.kv_dir.iterdir()} <= before
