"""Freeze, lose everything that is in memory, thaw: on the real engine, the real cache, real files."""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.restart import across_restart
from tests.support.conversations import without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
BLOCK = 32  # vLLM's own; its prefix cache hits whole blocks, LMCache whole chunks
QUESTION = {"role": "user", "content": "And then?"}


@dataclass
class Frozen:
    """A frozen conversation, and its next turn where it was never frozen."""

    name: str
    window: dict[str, Any]
    messages: list[dict[str, Any]]
    salt: str
    hashes: list[str]
    control: Any = None

    @property
    def whole(self) -> int:
        """Tokens in whole chunks."""
        return int(self.window["receipt"]["chunks"]) * CHUNK


@dataclass
class Shelf:
    """What was frozen before the restart, and what was done to its bytes while everything was down."""

    gateway: Gateway
    plain: Frozen
    evicted: Frozen
    redis_only: Frozen
    truncated: Frozen
    flipped: Frozen
    gone: Frozen


@across_restart
def shelf(stack: Stack, gateway: Gateway) -> Iterator[Shelf]:
    """Freeze six conversations, and harm five of them while everything is down."""
    plain = _frozen_on_a_boundary(gateway)
    others = [_frozen(gateway, name) for name in ("evicted", "redis-only", "truncated", "flipped", "gone")]
    yield Shelf(gateway, plain, *others)
    evicted, redis_only, truncated, flipped, gone = others
    _remove(_live(stack, evicted))
    _remove_redis(stack, evicted.salt, pins=False)
    _remove(_live(stack, redis_only), _pins(stack, redis_only))
    for frozen, harm in ((truncated, _truncate), (flipped, _flip)):
        _remove_redis(stack, frozen.salt, pins=True)
        harm(_in_chunk_order(stack, frozen)[2])
    _remove(_live(stack, gone), _pins(stack, gone))
    _remove_redis(stack, gone.salt, pins=True)


def test_w00_a_first_session_frozen_over_mcp_goes_on_bit_for_bit_as_one_that_was_never_frozen(shelf: Shelf) -> None:
    status = mcp(shelf.gateway, "window_status", window_name="plain")
    assert (status["description"], status["tags"]) == ("Kick-off of the widget", ["planning", "widget"])
    assert status["token_count"] > status["kv_cache"]["block_count"] > 0
    assert status["kv_cache"]["storage_tier"] == "disk"
    thawed = mcp(shelf.gateway, "window_thaw", window_name="plain")
    receipt = thawed["receipt"]
    assert receipt["chunks_found"] == receipt["chunks_expected"] == shelf.plain.window["receipt"]["chunks"]
    assert receipt["cached_tokens"] == shelf.plain.whole
    assert not receipt["partial"]
    answer = _ask(shelf.gateway, thawed["session_id"], [*shelf.plain.messages, QUESTION])
    control = shelf.plain.control
    assert _cached(answer) == _cached(control) == shelf.plain.whole
    assert _logprobs(answer) == _logprobs(control)  # tokens and, to the last bit, their probabilities


def test_a_thawed_session_takes_only_what_is_new_and_asks_the_engine_the_same(shelf: Shelf) -> None:
    session = shelf.gateway.thaw("plain")["session_id"]
    new = _ask(shelf.gateway, session, [QUESTION])
    assert new.usage.prompt_tokens == shelf.plain.control.usage.prompt_tokens
    assert _cached(new) >= shelf.plain.whole
    kept = shelf.gateway.http.get(f"/admin/sessions/{session}").json()
    assert kept["token_count"] == new.usage.total_tokens
    assert kept["window"] == "plain"
    shelf.gateway.freeze(session, "plain-went-on")
    messages = without_turns(shelf.gateway.http.get("/admin/windows/plain-went-on/messages").json()["messages"])
    assert messages[:-1] == [*shelf.plain.messages, QUESTION]
    assert messages[-1]["content"] == new.choices[0].message.content


def test_pins_restore_what_was_removed_from_disk_and_redis(stack: Stack, shelf: Shelf) -> None:
    assert not _live(stack, shelf.evicted)
    thawed = shelf.gateway.thaw("evicted", warm="gpu")
    assert thawed["receipt"]["chunks_relinked"] == shelf.evicted.window["receipt"]["chunks"]
    assert thawed["receipt"]["cached_tokens"] == shelf.evicted.whole
    assert {f.stat().st_ino for f in _live(stack, shelf.evicted)} == {
        f.stat().st_ino for f in _pins(stack, shelf.evicted)
    }


def test_a_window_comes_back_from_redis_alone(shelf: Shelf) -> None:
    receipt = shelf.gateway.thaw("redis-only", warm="gpu")["receipt"]
    assert receipt["cached_tokens"] == shelf.redis_only.whole
    assert not receipt["partial"]


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_object_is_found_reported_and_recomputed(shelf: Shelf, harm: str) -> None:
    frozen: Frozen = getattr(shelf, harm)
    thawed = shelf.gateway.thaw(harm, warm="gpu")
    receipt = thawed["receipt"]
    assert (receipt["chunks_corrupt"], receipt["chunks_found"], receipt["partial"]) == (1, 2, True)
    assert receipt["cached_tokens"] == 2 * CHUNK
    assert any("checksum" in warning for warning in thawed["warnings"])
    answer = _ask(shelf.gateway, thawed["session_id"], [*frozen.messages, QUESTION])
    assert answer.choices[0].message.content is not None
    # What was recomputed has landed again, so the same session can be frozen whole.
    again = shelf.gateway.freeze(thawed["session_id"], f"{harm}-again")
    assert again["kv"] == "complete"


def test_a_window_without_any_object_left_thaws_its_text_with_a_warning(shelf: Shelf) -> None:
    thawed = shelf.gateway.thaw("gone", warm="gpu")
    assert thawed["receipt"]["chunks_found"] == thawed["receipt"]["cached_tokens"] == 0
    assert thawed["receipt"]["partial"]
    assert thawed["warnings"]
    assert (
        without_turns(shelf.gateway.http.get("/admin/windows/gone/messages").json()["messages"]) == shelf.gone.messages
    )


def test_every_object_lies_where_its_computed_name_says(stack: Stack, shared: Gateway) -> None:
    converse(shared.client("named"), "names", turns=1)
    shared.freeze("named", "named-window")
    status = shared.http.get("/admin/windows/named-window", params={"include_blocks": "true"}).json()
    assert status["kv_cache"]["block_count"] == len(status["blocks"]) > 0
    for block in status["blocks"]:
        assert block["present"] == ["disk", "redis"]
        (file,) = stack.kv_dir.glob(f"*@{block['hash']}@*")
        assert file.stat().st_size == block["size_bytes"]
        names = list(stack.redis.scan_iter(f"*@{block['hash']}@*", count=10**5))
        assert sorted(name.startswith(b"cwg:") for name in names) == [False, True]  # LMCache's own, and our pin
        assert {stack.redis.strlen(name) for name in names} == {block["size_bytes"]}


def test_the_same_session_freezes_again_and_again_sharing_its_chunks(stack: Stack, own: Gateway) -> None:
    client = own.client("again")
    messages = converse(client, "again", turns=2)
    first = own.freeze("again", "first")
    assert own.http.get("/admin/sessions/again").json()["state"] == "frozen"
    same = own.freeze("again", "same")
    assert same["receipt"]["prompt_tokens"] is None, "nothing had to be computed"
    messages += [
        QUESTION,
        {"role": "assistant", "content": chat(client, [*messages, QUESTION]).choices[0].message.content},
    ]
    assert own.http.get("/admin/sessions/again").json()["state"] == "active"
    second = own.freeze("again", "second")
    assert second["token_count"] > first["token_count"]
    pins = {f.name for directory in (stack.plan.data_dir / "kv-pins").iterdir() for f in directory.iterdir()}
    salt = own.thaw("first")["cache_salt"]
    assert len([name for name in pins if salt in name]) == second["block_count"]
    assert without_turns(own.http.get("/admin/windows/first/messages").json()["messages"]) == messages[:-2]


def test_deleting_frees_what_no_other_window_holds_and_counts_real_bytes(stack: Stack, own: Gateway) -> None:
    converse(own.client("freed"), "freed", turns=2)
    window = own.freeze("freed", "original")
    clone = own.http.post("/admin/windows/original/clone", json={"target_window": "copy"}).json()
    assert clone["shared_blocks"] == window["block_count"]
    hashes = _hashes(own, "original")
    before = _usage(stack, hashes)
    assert all(before)
    kept = own.http.delete("/admin/windows/original").json()
    assert (kept["blocks_deleted"], kept["space_freed_bytes"]) == (0, 0)
    assert _usage(stack, hashes) == before
    freed = own.http.delete("/admin/windows/copy").json()
    assert freed["blocks_deleted"] == window["block_count"]
    assert freed["space_freed_bytes"] == sum(before)
    assert _usage(stack, hashes) == (0, 0)


def test_deleting_a_window_of_an_active_session_frees_its_pins_only(stack: Stack, own: Gateway) -> None:
    client = own.client("going")
    messages = converse(client, "going", turns=1)
    own.freeze("going", "snapshot")
    chat(client, [*messages, QUESTION])
    hashes = _hashes(own, "snapshot")
    done = own.http.delete("/admin/windows/snapshot").json()
    assert done["warnings"]
    assert all(list(stack.kv_dir.glob(f"*@{h}@*.data")) for h in hashes)
    assert not any(list((stack.plan.data_dir / "kv-pins").glob(f"*/*@{h}@*.data")) for h in hashes)


def test_less_than_a_chunk_keeps_the_text_and_warns_about_its_kv(shared: Gateway) -> None:
    chat(shared.client("short"), [{"role": "user", "content": "Hi"}], max_tokens=2)
    window = shared.freeze("short", "short-window")
    assert (window["kv"], window["block_count"]) == ("absent", 0)
    assert "less than one chunk" in window["warnings"][0]
    assert shared.thaw("short-window", warm="gpu")["receipt"]["chunks_expected"] == 0


def _frozen(gateway: Gateway, name: str) -> Frozen:
    messages = converse(gateway.client(f"session-{name}"), f"{name} {secrets.token_hex(4)}")
    window = gateway.freeze(f"session-{name}", name)
    assert window["kv"] == "complete"
    assert window["receipt"]["chunks"] > 3
    return Frozen(name, window, messages, str(gateway.thaw(name)["cache_salt"]), _hashes(gateway, name))


def _frozen_on_a_boundary(gateway: Gateway) -> Frozen:
    """A window whose whole blocks and whole chunks end at the same token.

    The last bits of a logprob depend on how many tokens are computed in one go (measured: the same prompt with another
    number of cached tokens differs in the third digit, wherever the hit came from). So the control, a conversation with
    the same turns that is never frozen, has to hit exactly as many tokens as the thawed one.
    """
    for attempt in range(20):
        topic = f"plain {secrets.token_hex(4)}"
        messages = converse(gateway.client(f"plain-{attempt}"), topic)
        name = f"try-{attempt}"
        window = gateway.freeze(f"plain-{attempt}", name)
        if window["token_count"] % CHUNK < BLOCK - 1:
            control = f"control-{attempt}"
            assert converse(gateway.client(control), topic) == messages
            answer = _ask(gateway, control, [*messages, QUESTION])
            if _cached(answer) == window["receipt"]["chunks"] * CHUNK:
                said = {"description": "Kick-off of the widget", "tags": ["planning", "widget"]}
                window = mcp(gateway, "window_freeze", session_id=f"plain-{attempt}", window_name="plain", **said)
                return Frozen("plain", window, messages, "", [], answer)
    raise AssertionError("no conversation ended on a boundary")


def _ask(gateway: Gateway, session: str, messages: list[dict[str, Any]]) -> Any:
    return chat(gateway.client(session), messages, max_tokens=24, logprobs=True, top_logprobs=3)


def _cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def _logprobs(answer: Any) -> list[Any]:
    return [token.model_dump() for token in answer.choices[0].logprobs.content]


def _hashes(gateway: Gateway, name: str) -> list[str]:
    """The chunk hashes of a window; its text is unique, so no other window has them."""
    status = gateway.http.get(f"/admin/windows/{name}", params={"include_blocks": "true"}).json()
    return [block["hash"] for block in status["blocks"]]


def _live(stack: Stack, frozen: Frozen) -> list[Path]:
    return list(stack.kv_dir.glob(f"*@{frozen.salt}.data"))


def _pins(stack: Stack, frozen: Frozen) -> list[Path]:
    return list((stack.plan.data_dir / "kv-pins").glob(f"*/*@{frozen.salt}.data"))


def _in_chunk_order(stack: Stack, frozen: Frozen) -> list[Path]:
    return [next(f for f in _live(stack, frozen) if h in f.name) for h in frozen.hashes]


def _remove(*lists: list[Path]) -> None:
    for file in (f for one in lists for f in one):
        file.unlink()


def _remove_redis(stack: Stack, salt: str, *, pins: bool) -> None:
    names = [k for k in stack.redis.scan_iter(f"*@{salt}", count=10**5) if pins or not k.startswith(b"cwg:")]
    stack.redis.delete(*names)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    with file.open("r+b") as f:
        f.seek(1000)
        byte = f.read(1)
        f.seek(1000)
        f.write(bytes([byte[0] ^ 1]))


def _usage(stack: Stack, hashes: list[str]) -> tuple[int, int]:
    """Bytes that objects and pins really take on disk (an inode once) and in Redis."""
    places = (stack.kv_dir, *(stack.plan.data_dir / "kv-pins").iterdir())
    stats = [f.stat() for h in hashes for place in places for f in place.glob(f"*@{h}@*.data")]
    disk = {stat.st_ino: stat.st_size for stat in stats}
    names = [name for h in hashes for name in stack.redis.scan_iter(f"*@{h}@*", count=10**5)]
    return sum(disk.values()), sum(stack.redis.strlen(name) for name in names)
