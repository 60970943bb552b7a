"""Workflows of somebody who tries things out: branches, clones, a library of contexts, a salt used by hand."""

import json
from typing import Any

import pytest

from tests.stack.clients import mcp
from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.tiers import contents, files, hashes
from tests.support.conversations import unbooked, without_turns

pytestmark = pytest.mark.stack

CHUNK = 64
Messages = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    """What a user says."""
    return {"role": "user", "content": text}


def say(gateway: Gateway, session: str, text: str) -> Messages:
    """One turn that sends only what is new; what was said, and the reply."""
    reply = chat(gateway.client(session), [user(text)]).choices[0].message
    return [user(text), {"role": "assistant", "content": reply.content}]


def messages_of(gateway: Gateway, window: str) -> Messages:
    """The transcript of a window."""
    return without_turns(gateway.http.get(f"/admin/windows/{window}/messages").json()["messages"])


def whole(window: dict[str, Any]) -> int:
    """Tokens in whole chunks, all of which have to hit."""
    tokens = int(window["receipt"]["chunks"]) * CHUNK
    assert tokens > 0
    return tokens


def test_w02_branches_of_one_conversation_have_their_own_histories_and_share_what_came_before(
    stack: Stack, shared: Gateway
) -> None:
    common = converse(shared.client("exploration"), "explore", turns=2)
    before = mcp(shared, "window_freeze", session_id="exploration", window_name="before-experiment")
    pristine = mcp(shared, "window_status", window_name="before-experiment", include_blocks=True)
    a = chat(shared.client("exploration"), [*common, user("Try approach A.")]).choices[0].message.content
    made_a = mcp(
        shared, "window_freeze", session_id="exploration", window_name="approach-a", tags=["experiment", "approach-a"]
    )
    mcp(shared, "window_thaw", window_name="before-experiment", new_session_id="exploration-b")
    b = say(shared, "exploration-b", "Try approach B instead.")
    made_b = mcp(
        shared, "window_freeze", session_id="exploration-b", window_name="approach-b", tags=["experiment", "approach-b"]
    )
    found = mcp(shared, "window_list", tags=["experiment"])
    assert ({one["name"] for one in found["windows"]}, found["total"]) == ({"approach-a", "approach-b"}, 2)
    assert messages_of(shared, "approach-a") == [
        *common, user("Try approach A."), {"role": "assistant", "content": a}
    ]  # fmt: skip
    assert messages_of(shared, "approach-b") == [*common, *b]
    for name, made in (("approach-a", made_a), ("approach-b", made_b)):
        assert mcp(shared, "window_thaw", window_name=name)["receipt"]["cached_tokens"] >= whole(made)
    after = mcp(shared, "window_status", window_name="before-experiment", include_blocks=True)
    assert unbooked(after) == unbooked(pristine)
    assert messages_of(shared, "before-experiment") == common
    chunks = {name: hashes(shared, name) for name in ("before-experiment", "approach-a", "approach-b")}
    first = chunks["before-experiment"]
    assert chunks["approach-a"][: len(first)] == chunks["approach-b"][: len(first)] == first
    together = {one for each in chunks.values() for one in each}
    assert len(files(stack, together, pins=True)) == len(together), "the common chunks are stored once"
    assert len(first) == before["block_count"]


def test_w03_a_clone_for_a_colleague_takes_no_bytes_and_either_window_outlives_the_other(
    stack: Stack, shared: Gateway
) -> None:
    messages = converse(shared.client("project"), "my project", turns=2)
    window = mcp(shared, "window_freeze", session_id="project", window_name="my-project")
    mine = hashes(shared, "my-project")
    before = contents(stack, mine)
    clone = mcp(
        shared, "window_clone",
        source_window="my-project", target_window="my-project-for-alice", description="For Alice",
    )  # fmt: skip
    assert clone["shared_blocks"] == len(mine) > 0
    assert contents(stack, mine) == before, "no object and no pin was made or changed"
    status = mcp(shared, "window_status", window_name="my-project-for-alice", include_lineage=True)
    assert status["parent_window"] == status["lineage"]["parent"] == "my-project"
    for name, session in (("my-project-for-alice", "alice"), ("my-project", "owner")):
        thawed = mcp(shared, "window_thaw", window_name=name, new_session_id=session)
        assert thawed["receipt"]["cached_tokens"] >= whole(window)
    said = {session: say(shared, session, f"This is {session}.") for session in ("alice", "owner")}
    for session, new in said.items():
        mcp(shared, "window_freeze", session_id=session, window_name=f"after-{session}")
        assert messages_of(shared, f"after-{session}") == [*messages, *new]
    unrelated = chat(shared.client("unrelated"), [*messages, user("And?")], max_tokens=1)
    assert unrelated.usage.prompt_tokens_details.cached_tokens == 0
    mcp(shared, "window_delete", window_name="my-project")
    assert mcp(shared, "window_thaw", window_name="my-project-for-alice")["receipt"]["cached_tokens"] >= whole(window)
    mcp(shared, "window_clone", source_window="my-project-for-alice", target_window="my-project")
    mcp(shared, "window_delete", window_name="my-project-for-alice")
    assert mcp(shared, "window_thaw", window_name="my-project")["receipt"]["cached_tokens"] >= whole(window)


def test_w08_the_salt_of_a_thaw_hits_at_the_engine_itself_and_no_other_does(stack: Stack, shared: Gateway) -> None:
    messages = converse(shared.client("salted"), "salted", turns=2)
    window = mcp(shared, "window_freeze", session_id="salted", window_name="salted")
    thawed = mcp(shared, "window_thaw", window_name="salted")
    salt = thawed["cache_salt"]
    body = {"model": "demo", "messages": [*messages, user("And?")], "max_tokens": 1}
    # What vLLM counts as cached was found in its own memory or loaded from the store: 0 is nothing in either.
    for given, least, most in (
        ({"cache_salt": salt}, whole(window), 10**6),
        ({}, 0, 0),
        ({"cache_salt": "another"}, 0, 0),
    ):
        usage = stack.engine.post("/v1/chat/completions", json=body | given).json()["usage"]
        assert least <= (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) <= most, given
    own = thawed["session_id"]
    for tool, arguments in (
        ("session_list", {"limit": 100}),
        ("window_list", {"limit": 100}),
        ("window_status", {"session_id": own}),
        ("window_status", {"window_name": "salted", "include_blocks": True}),
    ):
        assert salt not in json.dumps(mcp(shared, tool, **arguments)), f"{tool} tells the salt"


def test_w18_a_clone_can_be_used_hard_and_deleted_and_the_original_keeps_every_byte(
    stack: Stack, shared: Gateway
) -> None:
    messages = converse(shared.client("stable"), "stable", turns=2)
    window = mcp(shared, "window_freeze", session_id="stable", window_name="stable-context")
    before = contents(stack, hashes(shared, "stable-context"))
    status = mcp(shared, "window_status", window_name="stable-context", include_blocks=True)
    mcp(shared, "window_clone", source_window="stable-context", target_window="experiment-context")
    session = mcp(shared, "window_thaw", window_name="experiment-context")["session_id"]
    for attempt in range(3):
        say(shared, session, f"Experiment {attempt}.")
        mcp(shared, "window_freeze", session_id=session, window_name=f"experiment-{attempt}")
    for name in ("experiment-context", *(f"experiment-{attempt}" for attempt in range(3))):
        mcp(shared, "window_delete", window_name=name)
    assert shared.http.delete(f"/admin/sessions/{session}").status_code == 200
    assert contents(stack, hashes(shared, "stable-context")) == before
    assert unbooked(mcp(shared, "window_status", window_name="stable-context", include_blocks=True)) == unbooked(status)
    assert messages_of(shared, "stable-context") == messages
    assert mcp(shared, "window_thaw", window_name="stable-context")["receipt"]["cached_tokens"] >= whole(window)


def test_i2_a_library_of_contexts_stores_its_base_once(stack: Stack, shared: Gateway) -> None:
    converse(shared.client("base"), "the code base", turns=2)
    window = mcp(shared, "window_freeze", session_id="base", window_name="base-context", tags=["base"])
    base = hashes(shared, "base-context")
    before, counted = contents(stack, base), _held_by_windows(shared)
    tasks = [f"base-for-{task}" for task in ("auth", "billing", "search")]
    for name in tasks:
        mcp(shared, "window_clone", source_window="base-context", target_window=name, tags=["task"])
    assert contents(stack, base) == before
    assert _held_by_windows(shared) == counted
    assert mcp(shared, "window_list", tags=["task"])["total"] == len(tasks)
    for name in tasks:
        assert mcp(shared, "window_thaw", window_name=name)["receipt"]["cached_tokens"] >= whole(window)


def _held_by_windows(gateway: Gateway) -> dict[str, Any]:
    return {name: tier["windows"] for name, tier in mcp(gateway, "cache_stats")["tiers"].items() if "windows" in tier}
