"""A window at an earlier turn is what a freeze at that turn would have made."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import GatewayError
from gateway.windows.ask import ask
from gateway.windows.at_turn import held_at
from gateway.windows.clone import clone, isolate
from gateway.windows.delete import delete
from gateway.windows.freeze import Naming, freeze
from gateway.windows.restore import restore_for_turn
from gateway.windows.thaw import fanout, thaw, thaw_text
from gateway.windows.verify import verify
from tests.support.conversations import assistant, user
from tests.support.fakes.engine import MODEL, Exchange, FakeEngine, render
from tests.support.fakes.lmcache import CHUNK, FakeLMCache
from tests.support.prefix_cache_model import TENANT, Cached, opened

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("each_store")]
TURNS = 4
TALK: list[dict[str, Any]] = [
    message
    for number in range(1, TURNS + 1)
    for message in (user(f"question {number}, and what else there is to say"), assistant(f"answer {number}"))
]


@pytest.fixture
async def harness(engine: FakeEngine, fake_cache: FakeLMCache, tmp_path: Path) -> AsyncIterator[Cached]:
    """A session frozen after each of its turns, as `after-1` and so on; `w` is the last once more."""
    async with opened(engine, fake_cache, tmp_path) as harness:
        for number in range(1, TURNS + 1):
            await harness.session("s", TALK[: 2 * number])
            await harness.window(f"after-{number}", session="s")
        await harness.window("w", session="s")
        yield harness


@pytest.mark.parametrize("turn", range(1, TURNS + 1))
async def test_thaw_at_a_turn_equals_that_of_a_window_frozen_there(
    harness: Cached, engine: FakeEngine, turn: int
) -> None:
    expected = await thaw(harness.ctx, f"after-{turn}", new_session_id=None, warm="gpu")
    found = await thaw(harness.ctx, "w", new_session_id=None, warm="gpu", at_turn=turn)
    assert (found.session.transcript, found.session.token_count) == (
        expected.session.transcript,
        expected.session.token_count,
    )
    assert (found.session.salt, found.session.window) == (expected.session.salt, "w")
    assert found.session.last_reply_hash == expected.session.last_reply_hash
    for field in ("chunks_expected", "chunks_found", "expected_cached_tokens", "partial", "prompt_tokens"):
        assert getattr(found.receipt, field) == getattr(expected.receipt, field), field
    assert found.receipt.chunks_expected == found.session.token_count // CHUNK
    assert (found.receipt.at_turn, expected.receipt.at_turn) == (turn, None)
    one, other = [request.json["prompt"] for request in engine.seen("/v1/completions")[-2:]]
    assert one == other
    assert await harness.services.store.messages(found.session.transcript or b"") == TALK[: 2 * turn]


@pytest.mark.parametrize("make", [clone, isolate])
async def test_clone_at_a_turn_pins_only_its_chunks(harness: Cached, make: Any) -> None:
    store = harness.services.store
    (at_two, _), expected = await make(harness.ctx, "w", Naming("two"), 2), await store.window(TENANT, "after-2")
    assert expected is not None
    for field in ("token_count", "chunk_count", "size_bytes", "kv", "transcript", "chunk_size"):
        assert getattr(at_two, field) == getattr(expected, field), field
    manifest = await store.manifest(at_two)
    assert list(manifest.token_ids) == list((await store.manifest(expected)).token_ids)
    assert len(manifest.objects) == expected.chunk_count
    assert (at_two.receipt["chunks"], at_two.receipt["at_turn"]) == (expected.chunk_count, 2)
    for name in ("w", *(f"after-{number}" for number in range(1, TURNS + 1))):
        await delete(harness.ctx, name)
    assert len(harness.pinned) == expected.chunk_count
    verdict = await verify(harness.ctx, "two")
    assert (verdict.ok, verdict.chunks_usable) == (True, expected.chunk_count)
    _, _, receipt, _ = await thaw(harness.ctx, "two", new_session_id=None, warm="cpu")
    assert (receipt.chunks_found, receipt.partial) == (expected.chunk_count, False)
    await delete(harness.ctx, "two")
    assert harness.pinned == set()


async def test_clone_of_a_clone_at_a_turn(harness: Cached) -> None:
    await isolate(harness.ctx, "w", Naming("apart"), 3)
    copy, _ = await clone(harness.ctx, "apart", Naming("apart-1"), 1)
    await delete(harness.ctx, "apart")
    assert (await verify(harness.ctx, "apart-1")).ok
    assert copy.parent == "apart"
    with pytest.raises(GatewayError, match="has 1 turn, so there is no turn 2"):
        await thaw(harness.ctx, "apart-1", new_session_id=None, warm="none", at_turn=2)


async def test_fanout_and_ask_at_a_turn(harness: Cached, engine: FakeEngine) -> None:
    sessions, window, warnings = await fanout(harness.ctx, "w", 2, "f", 1)
    assert {session.transcript for session in sessions} == {window.transcript}
    assert await harness.services.store.messages(window.transcript) == TALK[:2]
    assert warnings == ()
    answer = await ask(harness.ctx, "w", "and?", at_turn=2)
    asked = engine.seen("/v1/chat/completions")[-1].json["messages"]
    assert asked == [*TALK[:4], user("and?")]
    assert (answer.restored.at_turn, answer.restored.chunks_found) == (2, window_chunks(asked[:4]))


def window_chunks(messages: list[dict[str, Any]]) -> int:
    return len(render(messages, generation_prompt=False)) // CHUNK


async def test_thawed_text_of_a_turn(harness: Cached, engine: FakeEngine) -> None:
    found = await thaw_text(harness.ctx, "w", new_session_id="t", warm="none", at_turn=2)
    assert await harness.services.store.messages(found.session.transcript or b"") == TALK[:4]
    assert found.receipt.computed_tokens == found.session.token_count == found.receipt.prompt_tokens
    assert (found.receipt.at_turn, found.receipt.as_text, found.receipt.expected_cached_tokens) == (2, True, 0)


async def test_first_turn_restores_only_the_chunks_of_its_turn(harness: Cached) -> None:
    session = (await thaw(harness.ctx, "w", new_session_id=None, warm="none", at_turn=2)).session
    harness.cache.evict()
    chunks = session.token_count // CHUNK
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == [(session.salt, chunks * CHUNK)]
    assert len(list(harness.cache.folder.iterdir())) == chunks


async def test_first_turn_restores_nothing_of_another_window_with_the_name(harness: Cached) -> None:
    session = (await thaw(harness.ctx, "w", new_session_id=None, warm="none", at_turn=2)).session
    await delete(harness.ctx, "w")
    await harness.window("w", session="other")
    harness.cache.evict()
    await restore_for_turn(harness.services, session)
    assert harness.cache.prefetches == []


async def test_template_that_renders_earlier_turns_differently_hits_less(harness: Cached, engine: FakeEngine) -> None:
    """Such as one that keeps the reasoning of the last turns only."""

    def tokens(exchange: Exchange) -> None:
        messages = [dict(one) for one in exchange.request.json["messages"]]
        if len(messages) < 2 * TURNS:
            messages[1]["content"] = "(thought) " + messages[1]["content"]
        ids = render(messages, generation_prompt=exchange.request.json.get("add_generation_prompt", True))
        exchange.json({"count": len(ids), "max_model_len": 4096, "tokens": ids})

    engine.on_tokenize = tokens
    _, window, receipt, _ = await thaw(harness.ctx, "w", new_session_id=None, warm="none", at_turn=3)
    whole = window.token_count // CHUNK
    first = len(render(TALK[:1], generation_prompt=True)) // CHUNK
    assert (receipt.chunks_expected, receipt.chunks_found, receipt.partial) == (whole, first, True)
    assert f"the KV of {whole - first} of {whole} chunks" in " ".join(receipt.warnings)


CALL = assistant("", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}])
RESULT = {"role": "tool", "tool_call_id": "1", "content": "42"}


@pytest.mark.parametrize(
    ("messages", "turn", "says", "hint", "count"),
    [
        (TALK, TURNS + 1, "has 4 turns, so there is no turn 5", "`at_turn` is 1 to 4", TURNS),
        ([*TALK, user("go"), CALL], TURNS + 1, "turn 5 of window 'odd' is not finished", "`at_turn` is 1 to 4", TURNS),
        ([user("go"), CALL, RESULT], 1, "turn 1 of window 'odd' is not finished", "omit `at_turn`", 0),
        ([{"role": "text", "content": "abc" * 20}], 1, "holds a text, which has no turns", "omit `at_turn`", 0),
    ],
)
async def test_no_such_turn(
    harness: Cached, messages: list[dict[str, Any]], turn: int, says: str, hint: str, count: int
) -> None:
    await harness.session("odd", messages, stored=False)
    window, _ = await freeze(harness.ctx, "odd", Naming("odd"))
    model = await harness.services.engines.model(MODEL)
    with pytest.raises(GatewayError) as caught:
        await held_at(harness.ctx, window, model, turn)
    error = caught.value
    assert (error.code, error.details) == (
        "invalid_request",
        {"field": "at_turn", "window_name": "odd", "turns": count},
    )
    assert says in error.message
    assert hint in error.hint


async def test_window_deleted_while_its_turn_is_counted(harness: Cached, engine: FakeEngine) -> None:
    """Between the text and the manifest: no session is made of what is gone."""
    window = await harness.services.store.window(TENANT, "w")
    assert window is not None
    await delete(harness.ctx, "w")
    for work in (
        held_at(harness.ctx, window, await harness.services.engines.model(MODEL), 2),
        thaw(harness.ctx, "w", new_session_id="t", warm="none", at_turn=2, window=window),
    ):
        with pytest.raises(GatewayError) as caught:
            await work
        assert caught.value.code == "window_not_found"
    assert await harness.services.store.session(TENANT, "t") is None
