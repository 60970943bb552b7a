"""An agent that keeps its own context by the tools of MCP, with real KV behind them."""

import secrets
from typing import Any

import pytest
from mcp import Client

from tests.stack.driver import Gateway, chat
from tests.support.mcp_clients import over_http, over_stdio

pytestmark = [pytest.mark.stack, pytest.mark.anyio]

CHUNK = 64
FREEZE = {
    "type": "function",
    "function": {
        "name": "window_freeze",
        "parameters": {
            "type": "object",
            "properties": {"window_name": {"type": "string", "enum": ["w"]}},
            "required": ["window_name"],
            "additionalProperties": False,
        },
    },
}


def calls_for_its_own_freeze(gateway: Gateway, session: str) -> None:
    """A session whose last reply is a tool call, as that of every agent is that freezes itself."""
    client = gateway.client(session)
    question = {"role": "user", "content": f"Remember this: {secrets.token_hex(4)}. " + "It matters. " * 150}
    for seed in range(20):  # the model is random: not every seed ends its arguments before the limit
        reply = chat(
            client, [question], tools=[FREEZE], tool_choice="required", max_tokens=80, temperature=1, seed=seed,
            extra_body={},
        )  # fmt: skip
        if reply.choices[0].finish_reason != "length":
            assert reply.choices[0].message.tool_calls
            return
    pytest.fail("no tool call was whole")


async def answer(client: Client, tool: str, told: list[str] | None = None, **arguments: Any) -> dict[str, Any]:
    async def seen(_: float, __: float | None, message: str | None) -> None:
        if told is not None:
            told.append((message or "").partition(" ")[0])

    result = await client.call_tool(tool, arguments, progress_callback=seen)
    assert not result.is_error, result.content
    return result.structured_content or {}


@pytest.mark.parametrize("transport", ["http", "stdio"])
async def test_an_agent_freezes_itself_asks_its_past_and_branches_on_real_kv(shared: Gateway, transport: str) -> None:
    session, name = f"mcp-{transport}", f"mcp-window-{transport}"
    calls_for_its_own_freeze(shared, session)
    connect = over_http(shared.url, timeout=120) if transport == "http" else over_stdio(shared.url)
    async with connect as client:
        told: list[str] = []
        before = await answer(client, "cache_stats")
        window = await answer(client, "window_freeze", told, session_id=session, window_name=name)
        chunks = window["receipt"]["chunks"]
        assert (window["kv"], chunks > 3, told[0]) == ("complete", True, "snapshot")
        after = await answer(client, "cache_stats")
        assert (after["windows"], after["total_bytes"] > 0) == (before["windows"] + 1, True)
        said = await answer(client, "window_ask", told, window_name=name, question="What matters?", max_tokens=8)
        assert said["receipt"]["cached_tokens"] >= chunks * CHUNK
        assert said["receipt"]["computed_tokens"] < 3 * CHUNK
        assert "answer" in told
        verdict = await answer(client, "window_verify", window_name=name, deep=True)
        assert (verdict["ok"], verdict["chunks_usable"]) == (True, chunks)
        assert [one["equal"] for one in verdict["deep"]] == [True, True]
        evicted = await answer(client, "window_evict", window_name=name)
        assert (evicted["tiers"]["cpu"]["after"], evicted["kept"]) == (0, 0)
        loaded = await answer(client, "window_prefetch", window_name=name)
        assert loaded["receipt"]["chunks_prefetched"] == chunks
        thawed = await answer(client, "window_thaw", window_name=name, new_session_id=f"{session}-on")
        assert thawed["receipt"]["cached_tokens"] >= chunks * CHUNK
        assert (await answer(client, "window_delete", window_name=name))["window_name"] == name
        assert name not in [one["name"] for one in (await answer(client, "window_list"))["windows"]]
