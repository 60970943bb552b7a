"""On the real stack: sessions without ids, and a window as a base URL, after everything was restarted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from tests.stack.conftest import Stack
from tests.stack.driver import Gateway, chat, converse
from tests.stack.restart import across_restart
from tests.stack.tiers import hashes

pytestmark = pytest.mark.stack

CHUNK = 64


@contextmanager
def unnamed(gateway: Gateway, path: str = "") -> Iterator[openai.OpenAI]:
    """An openai client that names no session."""
    with openai.OpenAI(base_url=f"{gateway.url}{path}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, messages: list[dict[str, Any]]) -> tuple[str, Any]:
    """A greedy turn; the session that it was put in, and the answer."""
    raw = client.chat.completions.with_raw_response.create(  # type: ignore[call-overload]
        model="demo", messages=messages, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    return raw.headers["x-session-id"], raw.parse()


def cached(answer: Any) -> int:
    """What the engine did not have to compute."""
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def _evict(stack: Stack, chunks: set[str]) -> None:
    """Take objects away from under LMCache's own names, in every tier; pins stay."""
    files = [file for file in stack.kv_dir.glob("*.data") if file.name.split("@")[3] in chunks]
    mine = [key for key in stack.redis.scan_iter("*@*", count=10**5) if not key.startswith(b"cwg:")]
    gone = [key for key in mine if key.decode().split("@")[-2] in chunks]
    assert len(files) == len(gone) == len(chunks)
    for file in files:
        file.unlink()
    stack.redis.delete(*gone)


@dataclass
class Frozen:
    """A conversation that was frozen, with its last reply."""

    gateway: Gateway
    session: str
    messages: list[dict[str, Any]]
    chunks: int


@across_restart
def by_history(stack: Stack, gateway: Gateway) -> Iterator[Frozen]:
    """A session without a name; the cache forgets all of it, and only the pins are left."""
    with unnamed(gateway) as client:
        messages = [*converse(client, "by history", turns=3), {"role": "user", "content": "And then?"}]
        session, answer = ask(client, messages)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    window = gateway.freeze(session, "by-history")
    assert window["kv"] == "complete"
    assert gateway.http.get(f"/admin/sessions/{session}").json()["turn_count"] == 4
    chunks = set(hashes(gateway, "by-history"))
    yield Frozen(gateway, session, messages, window["receipt"]["chunks"])
    _evict(stack, chunks)


def test_a_session_matched_by_history_is_frozen_and_continues_after_a_restart(by_history: Frozen) -> None:
    with unnamed(by_history.gateway) as client:
        session, answer = ask(client, [*by_history.messages, {"role": "user", "content": "Go on."}])
    assert session == by_history.session
    # The frozen session has restored its own KV, without a thaw.
    assert cached(answer) >= by_history.chunks * CHUNK
    turns = by_history.gateway.http.get(f"/admin/sessions/{session}").json()["turns"]
    assert turns[0]["recognised_by"] == "prefix"


@across_restart
def review(_: Stack, gateway: Gateway) -> Iterator[Frozen]:
    """A window to be continued at its base URL."""
    messages = converse(gateway.client("origin"), "by url", turns=3)
    window = gateway.freeze("origin", "pr-456-review")
    yield Frozen(gateway, "origin", messages, window["receipt"]["chunks"])


def test_i3_a_review_goes_on_after_a_restart_in_a_client_that_knows_its_base_url_alone(review: Frozen) -> None:
    gateway, chunks = review.gateway, review.chunks
    question = {"role": "user", "content": "What was it all about?"}
    with unnamed(gateway, "/w/pr-456-review") as client:
        delta, first = ask(client, [question])
        other_branch = [*review.messages, {"role": "user", "content": "Another question, of another branch."}]
        whole, second = ask(client, other_branch)
        assert cached(first) >= chunks * CHUNK
        assert cached(second) >= chunks * CHUNK
        assert len({"origin", delta, whole}) == 3
        reply = {"role": "assistant", "content": first.choices[0].message.content}
        on, _ = ask(client, [question, reply, {"role": "user", "content": "Go on."}])
        assert on == delta
    with anthropic.Anthropic(
        base_url=f"{gateway.url}/w/pr-456-review", api_key="none", max_retries=0, timeout=120
    ) as claude:
        message = claude.messages.create(
            model="demo", max_tokens=20, messages=[{"role": "user", "content": "In short?"}]
        )
        assert (message.usage.cache_read_input_tokens or 0) >= chunks * CHUNK
        with claude.messages.stream(
            model="demo", max_tokens=20, messages=[{"role": "user", "content": "In short, and streamed?"}]
        ) as stream:
            streamed = stream.get_final_message()
        assert (streamed.usage.cache_read_input_tokens or 0) >= chunks * CHUNK


def test_a_fork_hits_what_it_shares_with_the_session_that_it_left(shared: Gateway) -> None:
    with unnamed(shared) as client:
        messages = converse(client, "forked", turns=3)
        going, _ = ask(client, [*messages, {"role": "user", "content": "One way."}])
        fork, answer = ask(client, [*messages, {"role": "user", "content": "The other way."}])
        assert fork != going
        assert shared.http.get(f"/admin/sessions/{fork}").json()["forked_from"] == going
        third = chat(client, [*messages, {"role": "user", "content": "A third."}], max_tokens=1)
    assert cached(answer) >= (third.usage.prompt_tokens - CHUNK) // CHUNK * CHUNK
