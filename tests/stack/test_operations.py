"""Ask, verify, prefetch, fan out, isolate: on the real engine, the real cache, real files."""

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.restart import across_restart
from tests.stack.tiers import files, hashes, names
from tests.support.conversations import unbooked, without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
NEXT = {"role": "user", "content": "And then?"}


@pytest.fixture(scope="module")
def gateway(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a store of this file alone, so that a whole tier can be checked."""
    root = tmp_path_factory.mktemp("operations")
    gateway = Gateway(stack.settings(root / "data"), root / "gateway.log").start()
    yield gateway
    gateway.close()


def frozen(gateway: Gateway, name: str, **size: int) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """A window of a new conversation, its messages, and its salt."""
    messages = converse(gateway.client(f"s-{name}"), f"{name} {secrets.token_hex(4)}", **size)
    window = gateway.freeze(f"s-{name}", name)
    assert window["kv"] == "complete"
    assert window["receipt"]["chunks"] > 3
    return window, messages, str(gateway.thaw(name)["cache_salt"])


def long_window(stack: Stack, gateway: Gateway, name: str) -> tuple[dict[str, Any], str]:
    """A window of more than 8,000 tokens of 8,192, and its salt."""
    line = f"{secrets.token_hex(4)} is what was said, and so on. "

    def prompt(lines: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": line * lines}]

    def tokens(lines: int) -> int:
        answer = stack.engine.post("/tokenize", json={"model": "demo", "messages": prompt(lines)})
        return int(answer.json()["count"])

    each = (tokens(200) - tokens(100)) / 100
    lines = int((8050 - tokens(0)) / each)
    chat(gateway.client(f"s-{name}"), prompt(lines), max_tokens=8)
    window = gateway.freeze(f"s-{name}", name)
    assert window["kv"] == "complete"
    return window, str(gateway.thaw(name)["cache_salt"])


def post(gateway: Gateway, path: str, **body: Any) -> dict[str, Any]:
    """POST to the admin API, and insist that it worked."""
    answer = gateway.http.post(f"/admin/windows/{path}", json=body)
    assert answer.status_code in (200, 201), answer.text
    return dict(answer.json())


@across_restart
def asked(stack: Stack, gateway: Gateway) -> Iterator[tuple[Gateway, dict[str, Any], str]]:
    """A long window: what the engine finds of it after the restart was restored."""
    yield gateway, *long_window(stack, gateway, "asked")


def test_ten_asks_compute_only_question_and_tail_and_change_no_bytes(
    stack: Stack, asked: tuple[Gateway, dict[str, Any], str]
) -> None:
    gateway, window, salt = asked
    assert window["token_count"] > 8000
    whole = window["receipt"]["chunks"] * CHUNK
    before, sessions = _state(stack, salt), gateway.http.get("/admin/sessions").json()["total"]
    status = gateway.http.get("/admin/windows/asked").json()
    questions = 0
    for number in range(10):
        said = post(gateway, "asked/ask", question=f"What was said, in short ({number})?", max_tokens=8)
        receipt = said["receipt"]
        questions = max(questions, receipt["prompt_tokens"] - window["token_count"])
        assert receipt["cached_tokens"] >= whole
        assert receipt["computed_tokens"] <= window["receipt"]["tail_tokens"] + questions
        assert (receipt["chunks_found"], receipt["partial"]) == (receipt["chunks_expected"], False)
        assert 0 < receipt["completion_tokens"] <= 8
    assert questions < 64
    assert _state(stack, salt) == before
    assert unbooked(gateway.http.get("/admin/windows/asked").json()) == unbooked(status)
    assert gateway.http.get("/admin/sessions").json()["total"] == sessions
    assert post(gateway, "asked/verify")["ok"]


def test_verify_lists_what_is_damaged_and_what_is_missing_and_changes_nothing(stack: Stack, gateway: Gateway) -> None:
    window, _, salt = frozen(gateway, "checked")
    chunks = window["receipt"]["chunks"]
    good = post(gateway, "checked/verify")
    assert (good["ok"], good["damaged"], good["chunks_usable"]) == (True, [], chunks)
    for tier in ("disk", "redis"):
        assert good["tiers"][tier]["intact"] == good["tiers"][tier]["present"] == chunks
    blocks = gateway.http.get("/admin/windows/checked?include_blocks=true").json()["blocks"]
    hurt = {n: next(p for p in _pins(stack, salt) if blocks[n]["hash"] in p.name) for n in (1, 2, 3)}
    hurt[1].unlink()
    os.truncate(hurt[2], hurt[2].stat().st_size // 2)
    _flip(hurt[3])
    (in_redis,) = stack.redis.scan_iter(f"cwg:*@{blocks[2]['hash']}@{salt}", count=10**5)
    stack.redis.delete(in_redis)
    before = _state(stack, salt)
    bad = post(gateway, "checked/verify")
    assert _state(stack, salt) == before
    seen = [(one["chunk"], one["tier"], one["state"]) for one in bad["damaged"]]
    assert seen == [(1, "disk", "missing"), (2, "disk", "damaged"), (2, "redis", "missing"), (3, "disk", "damaged")]
    assert (bad["ok"], bad["chunks_usable"], bad["chunks_pinned"]) == (False, 2, chunks)


def test_an_evicted_window_is_only_in_the_tiers_until_it_is_prefetched(stack: Stack, gateway: Gateway) -> None:
    window, _, salt = frozen(gateway, "evicted")
    chunks = window["receipt"]["chunks"]
    assert post(gateway, "evicted/prefetch")["tiers"]["cpu"] == {"present": chunks}
    assert _in_memory(gateway, "evicted") == chunks
    assert gateway.http.get("/admin/cache").json()["tiers"]["cpu"]["objects"] >= chunks
    assert gateway.http.get("/admin/cache").json()["tiers"]["gpu"]["capacity_tokens"] > 0
    state = _state(stack, salt)
    evicted = post(gateway, "evicted/evict")
    everywhere = {"before": chunks, "after": chunks}
    assert evicted["tiers"] == {"cpu": {"before": chunks, "after": 0}, "disk": everywhere, "redis": everywhere}
    assert (evicted["objects"], evicted["kept"], evicted["warnings"]) == (chunks, 0, [])
    assert _state(stack, salt) == state
    assert _in_memory(gateway, "evicted") == 0
    assert post(gateway, "evicted/evict")["tiers"]["cpu"] == {"before": 0, "after": 0}
    assert post(gateway, "evicted/prefetch")["receipt"]["chunks_prefetched"] == chunks
    last = gateway.http.get("/admin/windows/evicted?include_blocks=true").json()["blocks"][-1]["hash"]
    for file in (*stack.kv_dir.glob(f"*{last}@{salt}.data"), *(p for p in _pins(stack, salt) if last in p.name)):
        file.unlink()
    stack.redis.delete(*stack.redis.scan_iter(f"*{last}@{salt}", count=10**5))
    evicted = post(gateway, "evicted/evict")
    assert (evicted["kept"], evicted["tiers"]["cpu"]["before"]) == (1, chunks - 1)
    assert "in no durable tier" in evicted["warnings"][0]
    assert post(gateway, "evicted/prefetch")["receipt"]["chunks_found"] == chunks - 1


def _in_memory(gateway: Gateway, name: str) -> int:
    tiers = gateway.http.get(f"/admin/windows/{name}").json()["kv_cache"]["tiers"]
    return int(tiers["cpu"]["present"])


def test_a_deep_verification_uses_the_bytes_of_each_tier_and_finds_wrong_ones(stack: Stack, gateway: Gateway) -> None:
    window, _, salt = frozen(gateway, "deep", turns=1, words=30)
    whole = window["receipt"]["chunks"] * CHUNK
    files, keys = sorted(p.name for p in stack.kv_dir.iterdir()), stack.redis.dbsize()
    good = post(gateway, "deep/verify", deep=True)
    assert good["ok"], good
    assert [one["tier"] for one in good["deep"]] == ["disk", "redis"]
    for one in good["deep"]:
        assert (one["equal"], one["first_difference"]) == (True, None)
        assert 1 <= one["tokens_compared"] <= 16  # fewer where two tokens were as good as equally likely
        assert one["cached_tokens"] == one["expected_cached_tokens"] == whole
        assert 0 <= one["largest_logprob_difference"] < 0.1
    # Sound KV of another chunk, of the right size: LMCache loads it as if it were this one. All but the
    # first are wrong: a single one may move what a random model says by less than the tolerance.
    blocks = gateway.http.get("/admin/windows/deep?include_blocks=true").json()["blocks"]
    first, *others = (next(p for p in _pins(stack, salt) if block["hash"] in p.name) for block in blocks)
    for pin in others:
        wrong = pin.with_suffix(".wrong")
        wrong.write_bytes(first.read_bytes())
        wrong.replace(pin)
    before = _state(stack, salt)
    bad = post(gateway, "deep/verify", deep=True)
    assert _state(stack, salt) == before
    assert [(d["chunk"], d["tier"], d["state"]) for d in bad["damaged"]] == [
        (chunk, "disk", "damaged") for chunk in range(1, len(blocks))
    ]
    disk, redis = bad["deep"]
    assert (disk["equal"], redis["equal"], bad["ok"]) == (False, True, False), bad
    assert disk["first_difference"]["position"] < 16
    assert disk["cached_tokens"] == whole, "the wrong bytes were really used"
    assert sorted(p.name for p in stack.kv_dir.iterdir()) == files
    assert stack.redis.dbsize() == keys


def test_i7_a_thaw_goes_on_at_once_with_a_prompt(gateway: Gateway) -> None:
    window, messages, _ = frozen(gateway, "gone-on")
    thawed = mcp(gateway, "window_thaw", window_name="gone-on", continuation_prompt="And then?", max_tokens=8)
    said = thawed["continuation"]
    assert said["cached_tokens"] >= window["receipt"]["chunks"] * CHUNK
    assert said["usage"]["completion_tokens"] <= 8
    gateway.freeze(thawed["session_id"], "went-on")
    told = without_turns(gateway.http.get("/admin/windows/went-on/messages").json()["messages"])
    assert told[:-1] == [*messages, {"role": "user", "content": "And then?"}]
    assert told[-1]["content"] == said["message"]["content"]


def test_a_fanout_hits_in_every_branch_and_makes_no_file(stack: Stack, gateway: Gateway) -> None:
    window, messages, salt = frozen(gateway, "fanned")
    before = _state(stack, salt)
    made = post(gateway, "fanned/fanout", count=5, prefix="branch")
    assert made["sessions"] == [f"branch-{n}" for n in range(1, 6)]
    assert _state(stack, salt) == before
    for session in made["sessions"]:
        usage = chat(gateway.client(session), [NEXT], max_tokens=4).usage
        assert usage.prompt_tokens > window["token_count"]
        assert usage.prompt_tokens_details.cached_tokens >= window["receipt"]["chunks"] * CHUNK
    kept = gateway.freeze("branch-3", "branch-3")["session_id"]
    assert kept == "branch-3"
    assert without_turns(gateway.http.get("/admin/windows/branch-3/messages").json()["messages"])[:-1] == [
        *messages,
        NEXT,
    ]


@across_restart
def fanned(stack: Stack, gateway: Gateway) -> Iterator[tuple[Gateway, list[str], int]]:
    """Sessions that begin after the restart: a fanout's and a thaw's. LMCache has lost all of their KV by then."""
    frozen(gateway, "fanned-out")
    sessions = post(gateway, "fanned-out/fanout", count=3, prefix="late")["sessions"]
    sessions.append(gateway.thaw("fanned-out")["session_id"])
    chunks = hashes(gateway, "fanned-out")
    yield gateway, sessions, len(chunks)
    for file in files(stack, chunks, pins=False):
        file.unlink()
    stack.redis.delete(*(name for name in names(stack, chunks) if not name.startswith(b"cwg:")))


def test_branches_that_all_begin_at_once_later_find_what_was_evicted_since(
    fanned: tuple[Gateway, list[str], int],
) -> None:
    gateway, sessions, chunks = fanned

    def begin(session: str) -> int:
        usage = chat(gateway.client(session), [NEXT], max_tokens=4).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    with ThreadPoolExecutor(len(sessions)) as threads:
        assert min(threads.map(begin, sessions)) >= chunks * CHUNK


def test_an_isolated_clone_hits_its_copy_takes_no_bytes_and_outlives_its_source(stack: Stack, gateway: Gateway) -> None:
    window, messages, salt = frozen(gateway, "source")
    control = _answer(gateway, "s-source", [*messages, NEXT])
    used = _disk_bytes(stack)
    clone = post(gateway, "source/clone", target_window="apart", isolate=True)
    assert (clone["kv"], clone["size_bytes"]) == ("complete", window["size_bytes"])
    assert clone["warnings"] == []
    thawed = gateway.thaw("apart")
    assert thawed["cache_salt"] != salt
    assert thawed["receipt"]["chunks_found"] == window["receipt"]["chunks"]
    assert _disk_bytes(stack) == used, "a link takes no bytes"
    answer = _answer(gateway, thawed["session_id"], [NEXT])
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached >= window["receipt"]["chunks"] * CHUNK, "under the new salt, nothing of it was ever computed"
    assert answer.choices[0].message.content == control.choices[0].message.content
    assert gateway.http.delete("/admin/windows/source").status_code == 200
    verdict = post(gateway, "apart/verify")
    assert (verdict["ok"], verdict["chunks_usable"]) == (True, window["receipt"]["chunks"])
    for session in gateway.http.get("/admin/sessions?limit=100").json()["sessions"]:
        gateway.http.delete(f"/admin/sessions/{session['id']}")
    assert len(_pins(stack, salt)) == window["receipt"]["chunks"], "it shares what its source had pinned"
    gone = gateway.http.delete("/admin/windows/apart").json()
    assert gone["blocks_deleted"] == window["receipt"]["chunks"]
    assert gone["space_freed_bytes"] > 0
    assert _state(stack, salt) == _state(stack, str(thawed["cache_salt"])) == {}


def _answer(gateway: Gateway, session: str, messages: list[dict[str, Any]]) -> Any:
    return chat(gateway.client(session), messages, max_tokens=16)


def _pins(stack: Stack, salt: str) -> list[Path]:
    return sorted((stack.plan.data_dir / "kv-pins").glob(f"*/*@{salt}.data"))


def _state(stack: Stack, salt: str) -> dict[str, bytes]:
    """Every object and pin of a salt, on disk and in Redis, with a digest of its bytes."""
    files = [*stack.kv_dir.glob(f"*@{salt}.data"), *_pins(stack, salt)]
    disk = {str(file): blake3(file.read_bytes()).digest() for file in files}
    names = sorted(stack.redis.scan_iter(f"*@{salt}", count=10**5))
    return disk | {name.decode(): blake3(stack.redis.get(name) or b"").digest() for name in names}


def _disk_bytes(stack: Stack) -> int:
    """Bytes that objects and pins really take: an inode once."""
    places = (stack.kv_dir, *(stack.plan.data_dir / "kv-pins").iterdir())
    stats = [file.stat() for place in places for file in place.glob("*.data")]
    return sum({stat.st_ino: stat.st_blocks * 512 for stat in stats}.values())


def _flip(file: Path) -> None:
    with file.open("r+b") as f:
        f.seek(1000)
        byte = f.read(1)
        f.seek(1000)
        f.write(bytes([byte[0] ^ 1]))
