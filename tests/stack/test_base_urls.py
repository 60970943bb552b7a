"""On the real stack: sessions that nobody names, and a window as a base URL, after everything was restarted."""

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.stack.conftest import Stack
from tests.stack.drive import Gateway, chat, converse

pytestmark = pytest.mark.stack

CHUNK = 64


@pytest.fixture
def plain(own: Gateway) -> Iterator[openai.OpenAI]:
    """An openai client that names no session."""
    with openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
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


def _evict(stack: Stack, hashes: set[str]) -> None:
    """Take objects away from under LMCache's own names, in every tier; pins stay."""
    files = [file for file in stack.kv_dir.glob("*.data") if file.name.split("@")[3] in hashes]
    mine = [key for key in stack.redis.scan_iter("*@*", count=10**5) if not key.startswith(b"cwg:")]
    gone = [key for key in mine if key.decode().split("@")[-2] in hashes]
    assert len(files) == len(gone) == len(hashes)
    for file in files:
        file.unlink()
    stack.redis.delete(*gone)


def test_a_session_known_by_its_history_alone_is_frozen_and_goes_on_after_a_restart(
    stack: Stack, own: Gateway, plain: openai.OpenAI
) -> None:
    messages = converse(plain, "by history", turns=3)
    found, answer = ask(plain, [*messages, {"role": "user", "content": "And then?"}])
    frozen = own.freeze(found, "by-history")
    assert frozen["kv"] == "complete"
    assert own.http.get(f"/admin/sessions/{found}").json()["turn_count"] == 4

    hashes = {block["hash"] for block in own.http.get("/admin/windows/by-history?include_blocks=true").json()["blocks"]}
    own.stop()
    stack.restart()
    _evict(stack, hashes)
    own.start()
    reply = answer.choices[0].message.content
    history = [*messages, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": reply}]
    again, after = ask(plain, [*history, {"role": "user", "content": "Go on."}])
    assert again == found
    # The frozen session has put its own KV back; nobody asked for a thaw.
    assert cached(after) >= frozen["receipt"]["chunks"] * CHUNK
    turns = own.http.get(f"/admin/sessions/{found}").json()["turns"]
    assert turns[0]["recognised_by"] == "prefix"


def test_i3_a_review_goes_on_after_a_restart_in_a_client_that_knows_its_base_url_alone(
    stack: Stack, own: Gateway
) -> None:
    messages = converse(own.client("origin"), "by url", turns=3)
    frozen = own.freeze("origin", "pr-456-review")
    chunks = frozen["receipt"]["chunks"]
    own.stop()
    stack.restart()
    own.start()
    question = {"role": "user", "content": "What was it all about?"}
    with openai.OpenAI(base_url=f"{own.url}/w/pr-456-review/v1", api_key="none", max_retries=0, timeout=120) as client:
        delta, first = ask(client, [question])
        whole, second = ask(client, [*messages, {"role": "user", "content": "Another question, of another branch."}])
        assert cached(first) >= chunks * CHUNK
        assert cached(second) >= chunks * CHUNK
        assert len({"origin", delta, whole}) == 3
        reply = {"role": "assistant", "content": first.choices[0].message.content}
        on, _ = ask(client, [question, reply, {"role": "user", "content": "Go on."}])
        assert on == delta
    with anthropic.Anthropic(
        base_url=f"{own.url}/w/pr-456-review", api_key="none", max_retries=0, timeout=120
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


def test_a_fork_hits_what_it_shares_with_the_session_that_it_left(own: Gateway, plain: openai.OpenAI) -> None:
    messages = converse(plain, "forked", turns=3)
    going, _ = ask(plain, [*messages, {"role": "user", "content": "One way."}])
    fork, answer = ask(plain, [*messages, {"role": "user", "content": "The other way."}])
    assert fork != going
    assert own.http.get(f"/admin/sessions/{fork}").json()["forked_from"] == going
    shared = chat(plain, [*messages, {"role": "user", "content": "A third."}], max_tokens=1).usage.prompt_tokens
    assert cached(answer) >= (shared - 64) // CHUNK * CHUNK
