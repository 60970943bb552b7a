"""MCP: every tool and resource, and wrong arguments."""

import asyncio
import json
from typing import Any

import pytest
from mcp import Client, MCPError
from mcp_types import TextResourceContents

from gateway.api.mcp.tools import tool_named
from tests.support.gateway_process import Gateway
from tests.support.mcp_answers import answer, code_of, post, refusal
from tests.support.mcp_clients import over_http, over_stdio

pytestmark = pytest.mark.anyio


TOOLS = {
    "window_freeze", "window_thaw", "window_list", "window_status", "window_clone", "window_delete", "session_list",
    "cache_stats", "health_check", "get_metrics_data", "auto_freeze_config", "auto_freeze_check", "window_ask",
    "window_verify", "window_prefetch", "window_tree", "window_fanout", "window_describe", "session_delete",
    "window_evict", "session_current", "savings", "window_search",
}  # fmt: skip


each_transport = pytest.mark.parametrize("client", ["http", "stdio-legacy"], indirect=True)  # and each era, once


async def test_the_tools_are_listed_as_the_table_has_them(client: Client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == TOOLS
    assert client.server_info.name == "context-window-gateway"
    assert "window_freeze" in (client.instructions or "")
    for name, tool in tools.items():
        in_table = tool_named(name)
        assert tool.description == str(in_table.about)
        assert tool.input_schema == in_table.input_schema
        assert tool.output_schema == in_table.output_schema
        assert tool.annotations is not None
    marked = {name: tool.annotations for name, tool in tools.items() if tool.annotations}
    assert TOOLS - {name for name, marks in marked.items() if marks.read_only_hint} == {
        "window_freeze", "window_thaw", "window_clone", "window_delete", "window_fanout", "window_describe",
        "window_prefetch", "window_evict", "session_delete", "auto_freeze_config",
    }  # fmt: skip
    assert {name for name, marks in marked.items() if marks.destructive_hint} == {"window_delete", "session_delete"}


async def test_an_agent_freezes_finds_clones_thaws_and_deletes(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    steps: list[tuple[float, str | None]] = []

    async def seen(progress: float, total: float | None, message: str | None) -> None:
        steps.append((progress, message))

    naming = {"description": "d", "tags": ["a", session], "ttl_seconds": 3600}
    frozen = await client.call_tool(
        "window_freeze", {"session_id": session, "window_name": f"w-{session}", **naming}, progress_callback=seen
    )
    assert not frozen.is_error, frozen.content
    assert (frozen.structured_content or {})["name"] == f"w-{session}"
    assert [message for _, message in steps][:2] == ["snapshot", "render"]
    assert [progress for progress, _ in steps] == [*range(1, len(steps) + 1)]

    cloned = await answer(client, "window_clone", source_window=f"w-{session}", target_window=f"c-{session}")
    assert (cloned["source_window"], cloned["target_window"]) == (f"w-{session}", f"c-{session}")
    found = await answer(client, "window_list", tags=["a", session], sort_by="size", sort_order="asc", limit=1)
    assert (len(found["windows"]), found["total"], found["has_more"]) == (1, 2, True)
    status = await answer(
        client, "window_status", window_name=f"c-{session}", include_blocks=True, include_lineage=True
    )
    assert (status["type"], status["blocks"], status["lineage"]["parent"]) == ("window", [], f"w-{session}")
    thawed = await answer(client, "window_thaw", window_name=f"w-{session}", new_session_id=f"t-{session}")
    assert thawed["session_id"] == f"t-{session}"
    assert thawed["receipt"]["cached_tokens"] >= 16
    of_session = await answer(client, "window_status", session_id=f"t-{session}")
    assert (of_session["type"], of_session["state"], of_session["window"]) == ("session", "thawed", f"w-{session}")
    listed = await answer(client, "session_list", state_filter="thawed", limit=1)
    assert [s["id"] for s in listed["sessions"]] == [f"t-{session}"]
    assert gateway.chat(f"t-{session}", "go on").status_code == 200
    deleted = await answer(client, "window_delete", window_name=f"w-{session}", delete_blocks=True)
    assert deleted["blocks_deleted"] == 0
    code, _ = await refusal(client, "window_status", window_name=f"w-{session}")
    assert code == "window_not_found"


@each_transport
async def test_an_agent_asks_its_past_and_branches_from_it(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    window = {"window_name": f"w-{session}"}
    stages: list[str | None] = []

    async def seen(progress: float, total: float | None, message: str | None) -> None:
        stages.append(message)

    asked = await client.call_tool(
        "window_ask", {**window, "question": "What then?", "max_tokens": 9}, progress_callback=seen
    )
    said = asked.structured_content or {}
    assert (said["answer"], said["receipt"]["cached_tokens"] >= 16) == ("Hello there!", True), asked.content
    assert stages[-1] == "answer"
    verdict = await answer(client, "window_verify", **window)
    assert (verdict["ok"], verdict["damaged"]) == (False, []), "it holds no KV"
    assert await refusal(client, "window_prefetch", **window) == (
        "cache_unavailable", "cache_unavailable: no cache is configured to load into (set cache_url)"
    )  # fmt: skip
    assert await refusal(client, "window_evict", **window) == (
        "cache_unavailable", "cache_unavailable: no cache is configured to evict from (set cache_url)"
    )  # fmt: skip
    fanned = await answer(client, "window_fanout", **window, count=2, prefix=f"f-{session}")
    assert fanned["sessions"] == [f"f-{session}-1", f"f-{session}-2"]
    nodes = {node["name"]: node for node in (await answer(client, "window_tree", limit=50))["nodes"]}
    assert nodes[f"w-{session}"]["parent"] == {"kind": "session", "name": session}
    assert nodes[f"f-{session}-2"]["relation"] == "thawed from"
    assert (await answer(client, "session_delete", session_id=f"f-{session}-2"))["deleted"]
    assert (await refusal(client, "window_status", session_id=f"f-{session}-2"))[0] == "session_not_found"


@each_transport
async def test_the_description_of_a_window_is_changed_and_cleared(
    client: Client, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}", description="old", tags=["old"], ttl_seconds=3600)

    async def describe(**said: Any) -> tuple[str, list[str], bool]:
        now = await answer(client, "window_describe", window_name=f"w-{session}", **said)
        return now["description"], now["tags"], now["expires_at"] is None

    assert await describe(description="new", tags=None) == ("new", ["old"], False)
    assert await describe(description="", tags=[], ttl_seconds=0) == ("", [], True)
    assert (await refusal(client, "window_describe", window_name=f"w-{session}"))[0] == "invalid_request"


@each_transport
async def test_automatic_freezing_is_read_set_checked_and_reset(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session, "a question that is longer than one chunk of sixteen tokens, and a threshold of ten " * 2)
    try:
        before = await answer(client, "auto_freeze_config")
        assert before["policy"] == gateway_rules(gateway)
        idle = {"idle_timeout_minutes": 0.5, "context_share": None, "token_threshold": 10}
        now = await answer(client, "auto_freeze_config", policy={"enabled": True, **idle})
        assert now["policy"] == {**before["policy"], "enabled": True, **idle} == gateway_rules(gateway)
        assert set(now["set_at_run_time"]) == {"enabled", *idle}
        check = await answer(client, "auto_freeze_check", session_id=session, token_count=5)
        assert check["token_count"] == gateway.turns(session)[0]["prompt_tokens"] + 3
        assert (check["triggered"], check["window_name"][:5]) == (True, "auto-")
        refused = await refusal(client, "auto_freeze_config", policy={"token_threshold": 10**8})
        assert refused[0] == "invalid_request"
        assert "above the context limit" in refused[1]
        assert (await answer(client, "auto_freeze_config"))["policy"] == now["policy"]
    finally:
        assert (await answer(client, "auto_freeze_config", reset=True))["policy"] == before["policy"]


def gateway_rules(gateway: Gateway) -> dict[str, Any]:
    answer = gateway.http.get("/admin/policies").json()
    return {name: answer[name] for name in answer if name not in ("set_at_run_time", "available")}


@each_transport
async def test_health_metrics_and_cache_are_reported(client: Client, gateway: Gateway, session: str) -> None:
    before = await answer(client, "cache_stats")
    gateway.chat(session)
    gateway.chat(session)  # which is in the engine's cache now
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    after = await answer(client, "cache_stats")
    assert after["windows"] == before["windows"] + 1
    assert (after["total_blocks"], after["total_bytes"], after["tiers"]) == (0, 0, {})
    assert after["prompt_tokens"] > before["prompt_tokens"]
    assert 0 < after["hit_rate"] < 1
    kv = after["kv_store"]
    assert (kv["total_blocks"], kv["total_bytes"], kv["total_size_bytes"], kv["hit_rate"]) == (
        0,
        0,
        0,
        after["hit_rate"],
    )
    assert kv["hits"] + kv["misses"] == after["prompt_tokens"]
    assert after["vllm"] == {"connected": True, "hit_rate": after["hit_rate"], "cached_tokens": kv["hits"]}
    health = await answer(client, "health_check")
    names = [component["name"] for component in health["components"]]
    assert names == [*health["by_name"]] == ["engine", "cache", "tiers", "store", "isolation"]
    only = await answer(client, "health_check", component="VLLM")
    assert ([*only["by_name"]], only["name"], only["status"]) == (["engine"], "engine", "healthy")
    metrics = {row["name"] for row in (await answer(client, "get_metrics_data", format="json"))["metrics"]}
    assert "cwg_turns_total" in metrics
    assert (
        "# TYPE cwg_turns_total counter" in (await answer(client, "get_metrics_data", format="prometheus"))["content"]
    )


async def test_resources_are_read(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")

    async def read(uri: str) -> Any:
        [content] = (await client.read_resource(uri)).contents
        assert isinstance(content, TextResourceContents)
        assert (content.mime_type, content.uri) == ("application/json", uri)
        return json.loads(content.text)

    listed = {r.uri for r in (await client.list_resources()).resources}
    assert listed == {"cwg://windows", "cwg://sessions", "cwg://stats", "cwg://health"}
    [template] = (await client.list_resource_templates()).resource_templates
    assert template.uri_template == "cwg://windows/{name}/messages"
    assert f"w-{session}" in [w["name"] for w in (await read("cwg://windows"))["windows"]]
    assert f"w-{session}" in [w["name"] for w in (await read("cwm://windows"))["windows"]]
    assert session in [s["id"] for s in (await read("cwg://sessions"))["sessions"]]
    assert (await read("cwg://stats"))["windows"] >= 1
    assert (await read("cwg://health"))["status"]
    for old, new in (
        ("windows://list", "cwg://windows"),
        ("sessions://list", "cwg://sessions"),
        ("stats://cache", "cwg://stats"),
        ("cwm://stats", "cwg://stats"),
    ):
        assert (await read(old)).keys() == (await read(new)).keys()
    assert (await read("health://status"))["components"]
    messages = (await read(f"cwg://windows/w-{session}/messages"))["messages"]
    assert [m["content"] for m in messages] == ["hi", "Hello there!"]
    absent = -32602 if client.protocol_version == "2026-07-28" else -32002
    for uri, code, number in (
        ("cwg://windows/no-such-window/messages", "window_not_found", absent),
        ("cwg://nothing", "not_found", absent),
        ("cwg://windows/..%2F..%2Fsessions/messages", "invalid_window_name", -32602),
    ):
        with pytest.raises(MCPError, match=f"^{code}: ") as caught:
            await client.read_resource(uri)
        assert (caught.value.error.code, caught.value.error.data["code"]) == (number, code)


@each_transport
async def test_there_is_one_page_of_every_list(client: Client) -> None:
    for listed in (client.list_tools, client.list_resources, client.list_resource_templates):
        with pytest.raises(MCPError, match=r"^invalid_request: unknown cursor 'next'") as caught:
            await listed(cursor="next")
        assert caught.value.error.code == -32602


HUGE = "x" * 200_000


W = {"session_id": "s", "window_name": "w"}


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("window_freeze", {"window_name": "w"}, "invalid_request", "session_id is missing"),
    ("window_freeze", {"session_id": "s", "window_name": None}, "invalid_request", "window_name is missing"),
    ("window_freeze", {"session_id": 7, "window_name": "w"}, "invalid_session_id", "session_id 7"),
    ("window_freeze", {"session_id": "../a", "window_name": "w"}, "invalid_session_id", "session_id '../a'"),
    ("window_freeze", {"session_id": "s", "window_name": HUGE}, "invalid_window_name", "window_name 'xxx"),
    ("window_freeze", {**W, "tags": "a"}, "invalid_request", "tags must be"),
    ("window_freeze", {**W, "tags": ["a,b"]}, "invalid_request", "tags must be"),
    ("window_freeze", {**W, "tags": ["a"] * 9999}, "invalid_request", "tags must"),
    ("window_freeze", {**W, "description": HUGE}, "invalid_request", "description must"),
    ("window_freeze", {**W, "ttl_seconds": True}, "invalid_request", "ttl_seconds must"),
    ("window_freeze", {**W, "ttl": 5}, "unknown_parameter", "ttl_seconds"),
    ("window_freeze", {"session_id": "no-such", "window_name": "w"}, "session_not_found", "'no-such'"),
    ("window_thaw", {"window_name": "no-such"}, "window_not_found", "'no-such'"),
    ("window_thaw", {"window_name": "a/b"}, "invalid_window_name", "window_name 'a/b'"),
    ("window_thaw", {"window_name": "w", "warm_cache": 1}, "invalid_request", "warm_cache must be one of gpu"),
    ("window_list", {"limit": "5"}, "invalid_request", "limit must be a whole number from 1 to 100"),
    ("window_list", {"limit": 101}, "invalid_request", "limit must be"),
    ("window_list", {"limit": True}, "invalid_request", "limit must be"),
    ("window_list", {"search": {"a": [HUGE]}}, "invalid_request", "search must be"),
    ("window_list", {"created_after": "yesterday"}, "invalid_request", "created_after must be an ISO 8601"),
    ("window_list", {"sort_by": "luck"}, "invalid_request", "sort_by must be one of name"),
    ("window_list", {"lmit": 5}, "unknown_parameter", "did you mean 'limit'"),
    ("window_status", {}, "invalid_request", "exactly one of window_name or session_id"),
    ("window_status", W, "invalid_request", "exactly one of"),
    ("window_status", {"window_name": "w", "include_blocks": "yes"}, "invalid_request", "include_blocks must be true"),
    ("window_clone", {"source_window": "no-such", "target_window": "c"}, "window_not_found", "'no-such'"),
    (
        "window_clone",
        {"source_window": "w", "target_window": "a", "new_window_name": "b"},
        "invalid_request",
        "target_window and new_window_name are one parameter",
    ),
    ("window_delete", {"window_name": "w", "delete_blocks": False}, "invalid_request", "omit it: KV that another"),
    ("session_list", {"state_filter": "asleep"}, "invalid_request", "state_filter must be one of active"),
    ("cache_stats", {"x": 1}, "unknown_parameter", "'x'"),
    ("health_check", {"component": "moon"}, "invalid_request", "component must be one of engine"),
    ("get_metrics_data", {"format": "xml"}, "invalid_request", "format must be one of json"),
]


@each_transport
async def test_wrong_arguments_are_refused_and_named(client: Client) -> None:
    for tool, arguments, code, says in WRONG:
        seen, text = await refusal(client, tool, **arguments)
        assert (seen, says in text) == (code, True), (tool, text)


@each_transport
async def test_an_unknown_tool_is_refused_and_the_known_are_named(client: Client) -> None:
    with pytest.raises(MCPError, match=r"not_found: there is no tool 'window_melt' \(tools are window_freeze, "):
        await client.call_tool("window_melt", {})


HUGE_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("window_freeze", {**W, "description": "x" * 900_000}, "invalid_request"),
    ("window_freeze", {**W, "tags": ["a"] * 200_000}, "invalid_request"),
    ("window_freeze", {"session_id": "x" * 900_000, "window_name": "w"}, "invalid_session_id"),
    ("window_freeze", {**W, "x" * 900_000: 1}, "unknown_parameter"),
    ("window_freeze", {**W, "tags": [{"a": ["b"] * 200_000}]}, "invalid_request"),
    ("window_ask", {"window_name": "w", "question": "x" * 900_000}, "invalid_request"),
    ("auto_freeze_config", {"policy": {"policies": [{}] * 90_000}}, "invalid_request"),
    ("auto_freeze_config", {"policy": {"policies": [{"use": "x" * 900_000}]}}, "invalid_request"),
]


@each_transport
async def test_huge_arguments_are_refused_and_nothing_else_is_lost(
    client: Client, gateway: Gateway, session: str
) -> None:
    gateway.chat(session)
    before = gateway.http.get("/admin/windows").json()["total"]
    ours = answer(client, "window_freeze", session_id=session, window_name=f"w-{session}")
    refused = [refusal(client, tool, **arguments) for tool, arguments, _ in HUGE_CALLS]
    frozen, *seen = await asyncio.gather(ours, *refused)
    assert [code for code, _ in seen] == [code for _, _, code in HUGE_CALLS]
    with pytest.raises(MCPError, match="not_found: there is no tool") as caught:
        await client.call_tool("x" * 9000, {})  # it is in a header too
    assert len(str(caught.value)) < 1000
    assert gateway.http.get("/admin/windows").json()["total"] == before + 1
    assert (await answer(client, "window_status", window_name=frozen["name"]))["receipt"] == frozen["receipt"]


MILLIONS: list[dict[str, Any]] = [{**W, "description": "x" * 2**20}, {**W, "tags": ["a"] * 10**6}]


async def test_what_is_larger_than_a_request_may_be_is_not_read_over_http(gateway: Gateway) -> None:
    async with over_http(gateway.url) as client:
        for arguments in MILLIONS:
            with pytest.raises(MCPError):
                await client.call_tool("window_freeze", arguments)
            call = {"name": "window_freeze", "arguments": arguments}
            response = post(gateway, {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call})
            assert code_of(response) == (413, "payload_too_large")
            assert response.json()["error"]["hint"] == "no tool takes so much"
        assert (await answer(client, "health_check", component="store"))["status"] == "healthy"


async def test_over_stdio_the_refusal_keeps_its_code(gateway: Gateway) -> None:
    async with over_stdio(gateway.url) as client:
        for arguments in MILLIONS:
            assert (await refusal(client, "window_freeze", **arguments))[0] == "invalid_request"
        assert (await answer(client, "health_check", component="store"))["status"] == "healthy"


@each_transport
async def test_the_words_of_the_replaced_system_are_understood(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    cloned = await answer(client, "window_clone", source_window=f"w-{session}", new_window_name=f"c-{session}")
    assert cloned["target_window"] == f"c-{session}"
    await answer(client, "window_list", sort_by="total_size_bytes")
    status = await answer(client, "window_status", window_name=f"w-{session}", include_cache_stats=True)
    assert status["kv_cache"]["block_count"] == 0
    without = {"stored": False, "block_count": 0, "blocks_available": 0, "cache_complete": False}
    assert without.items() <= status["cache_stats"].items()
    of_session = await answer(client, "window_status", session_id=session, include_cache_stats=True)
    (turn,) = of_session["turns"]
    assert of_session["cache_stats"] == {
        "prompt_tokens": turn["prompt_tokens"],
        "cached_tokens": turn["cached_tokens"],
        "hit_rate": round(turn["cached_tokens"] / turn["prompt_tokens"], 4),
        "window_count": 2,
    }
    assert "cache_stats" not in await answer(client, "window_status", session_id=session, include_cache_stats=False)
    for warm, cached in ((False, False), (True, True), ("none", False)):
        thawed = await answer(client, "window_thaw", window_name=f"w-{session}", warm_cache=warm)
        assert (thawed["receipt"]["cached_tokens"] is not None) is cached
        assert thawed["cache_hit"] is (True if cached else None)
    await answer(client, "window_delete", window_name=f"w-{session}", force=True, delete_blocks=True)


@each_transport
async def test_calls_at_the_same_time_do_not_disturb_each_other(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    names = [f"{session}-{n}" for n in range(8)]
    clone = [answer(client, "window_clone", source_window=f"w-{session}", target_window=name) for name in names]
    assert [cloned["name"] for cloned in await asyncio.gather(*clone)] == names
    same = {"target_window": f"same-{session}"}
    results = await asyncio.gather(*(client.call_tool("window_clone", {"source_window": n, **same}) for n in names))
    assert sum(not result.is_error for result in results) == 1
    refused = {(r.structured_content or {})["error"]["code"] for r in results if r.is_error}
    assert refused == {"window_already_exists"}
