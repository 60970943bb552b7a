"""The tools as the official client sees them, over both transports, before the real gateway process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, TextContent, TextResourceContents

from tests.fakes.engine import FakeEngine
from tests.running import ROOT, Gateway, environment, free_port, gateway_before

pytestmark = pytest.mark.anyio

KEY = "correct-horse-battery"
TOOLS = {
    "window_freeze", "window_thaw", "window_list", "window_status", "window_clone", "window_delete", "session_list",
    "cache_stats", "health_check", "get_metrics_data",
}  # fmt: skip


@asynccontextmanager
async def over_http(url: str, mode: str = "auto", **headers: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers=headers, timeout=15) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


@asynccontextmanager
async def over_stdio(url: str, mode: str = "auto", key: str = "") -> AsyncIterator[Client]:
    given = environment({"CWG_URL": url, "CWG_API_KEY": key})
    server = StdioServerParameters(command=sys.executable, args=["-m", "gateway", "mcp"], env=given, cwd=ROOT)
    async with Client(stdio_client(server), mode=mode) as client:
        yield client


@pytest.fixture(params=["http", "http-legacy", "stdio", "stdio-legacy"])
async def client(request: pytest.FixtureRequest, gateway: Gateway) -> AsyncIterator[Client]:
    """A client of the shared gateway, over each transport, in each generation of the protocol."""
    transport, _, era = request.param.partition("-")
    connect = over_http if transport == "http" else over_stdio
    async with connect(gateway.url, era or "auto") as client:
        yield client


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool that succeeds. What it answers for programs and for models is the same."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    structured = result.structured_content
    assert isinstance(structured, dict)
    assert json.loads(text_of(result)) == structured
    return structured


async def refusal(client: Client, tool: str, **arguments: Any) -> tuple[str, str]:
    """Call a tool that fails; return the code, and what the model reads."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    assert result.structured_content is not None
    error = result.structured_content["error"]
    assert set(error) == {"code", "message", "hint", "retryable", "details"}
    text = text_of(result)
    assert text.startswith(f"{error['code']}: {error['message']}")
    assert error["hint"] in text
    assert len(text) < 2000
    return error["code"], text


def text_of(result: CallToolResult) -> str:
    [content] = result.content
    assert isinstance(content, TextContent)
    return content.text


async def test_the_tools_can_be_read_by_a_model(client: Client) -> None:
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) >= TOOLS
    assert client.server_info.name == "context-window-gateway"
    assert "window_freeze" in (client.instructions or "")
    for tool in tools.values():
        assert "Returns" in (tool.description or ""), tool.name
        assert tool.output_schema is not None
        assert tool.input_schema["additionalProperties"] is False
        for name, schema in tool.input_schema["properties"].items():
            assert schema["type"], (tool.name, name)
            assert schema["description"], (tool.name, name)
    reads = {name for name, tool in tools.items() if tool.annotations and tool.annotations.read_only_hint}
    assert reads & TOOLS == TOOLS - {"window_freeze", "window_thaw", "window_clone", "window_delete"}


async def test_an_agent_freezes_finds_clones_thaws_and_deletes(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    steps: list[tuple[float, str | None]] = []

    async def seen(progress: float, total: float | None, message: str | None) -> None:
        steps.append((progress, message))

    naming = {"description": "d", "tags": ["a", session], "ttl_seconds": 60}
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


async def test_health_metrics_and_the_cache_are_told(client: Client, gateway: Gateway, session: str) -> None:
    before = await answer(client, "cache_stats")
    gateway.chat(session)
    assert gateway.freeze(session, f"w-{session}").status_code == 201
    after = await answer(client, "cache_stats")
    assert after["windows"] == before["windows"] + 1
    assert after["prompt_tokens"] > before["prompt_tokens"]
    assert 0 < after["hit_rate"] < 1
    assert set((await answer(client, "health_check"))["components"]) >= {"engine", "cache", "store"}
    assert set((await answer(client, "health_check", component="vllm"))["components"]) == {"engine"}
    names = {row["name"] for row in (await answer(client, "get_metrics_data", format="json"))["metrics"]}
    assert "cwg_turns_total" in names
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
    assert (await read("cwg://stats"))["metrics"]
    assert (await read("cwg://health"))["status"]
    messages = (await read(f"cwg://windows/w-{session}/messages"))["messages"]
    assert [m["content"] for m in messages] == ["hi", "Hello there!"]
    for uri, code in (
        ("cwg://windows/no-such-window/messages", "window_not_found"),
        ("cwg://nothing", "not_found"),
        ("cwg://windows/..%2F..%2Fsessions/messages", "invalid_window_name"),
    ):
        with pytest.raises(MCPError, match=f"^{code}: ") as caught:
            await client.read_resource(uri)
        assert caught.value.error.data["code"] == code


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
    (
        "window_freeze",
        {**W, "description": HUGE},
        "invalid_request",
        "description must",
    ),
    (
        "window_freeze",
        {**W, "ttl_seconds": True},
        "invalid_request",
        "ttl_seconds must",
    ),
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
        "target_window is given more than once",
    ),
    (
        "window_delete",
        {"window_name": "w", "delete_blocks": False},
        "invalid_request",
        "delete_blocks must be one of true",
    ),
    ("session_list", {"state_filter": "asleep"}, "invalid_request", "state_filter must be one of active"),
    ("cache_stats", {"x": 1}, "unknown_parameter", "'x'"),
    ("health_check", {"component": "moon"}, "invalid_request", "component must be one of engine"),
    ("get_metrics_data", {"format": "xml"}, "invalid_request", "format must be one of json"),
]


async def test_wrong_arguments_are_refused_and_named(client: Client) -> None:
    for tool, arguments, code, says in WRONG:
        seen, text = await refusal(client, tool, **arguments)
        assert (seen, says in text) == (code, True), (tool, text)


async def test_an_unknown_tool_is_refused_and_the_known_are_named(client: Client) -> None:
    with pytest.raises(MCPError, match=r"not_found: there is no tool 'window_melt' \(tools are window_freeze, "):
        await client.call_tool("window_melt", {})


async def test_the_words_of_the_replaced_system_are_understood(client: Client, gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    gateway.freeze(session, f"w-{session}")
    cloned = await answer(client, "window_clone", source_window=f"w-{session}", new_window_name=f"c-{session}")
    assert cloned["target_window"] == f"c-{session}"
    await answer(client, "window_list", sort_by="total_size_bytes")
    status = await answer(client, "window_status", window_name=f"w-{session}", include_cache_stats=True)
    assert status["kv_cache"]["block_count"] == 0
    for warm, cached in ((False, False), (True, True), ("none", False)):
        thawed = await answer(client, "window_thaw", window_name=f"w-{session}", warm_cache=warm)
        assert (thawed["receipt"]["cached_tokens"] is not None) is cached
    await answer(client, "window_delete", window_name=f"w-{session}", force=True, delete_blocks=True)


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


# --- the door


@pytest.fixture(scope="module")
def guarded(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key."""
    with gateway_before(shared_engine.url, tmp_path_factory.mktemp("guarded-mcp"), api_key=KEY) as gateway:
        yield gateway


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
async def test_the_key_opens_the_door_and_is_asked_for_again_behind_it(
    guarded: Gateway, headers: dict[str, str]
) -> None:
    async with over_http(guarded.url, **headers) as client:
        assert (await answer(client, "session_list"))["total"] == 0
        assert (await client.read_resource("cwg://health")).contents


async def test_stdio_sends_the_key_it_was_given(guarded: Gateway) -> None:
    async with over_stdio(guarded.url, key=KEY) as client:
        assert (await answer(client, "session_list"))["total"] == 0
    async with over_stdio(guarded.url, key="wrong") as client:
        assert (await refusal(client, "session_list"))[0] == "unauthorized"


async def test_stdio_says_so_when_no_gateway_answers() -> None:
    async with over_stdio(f"http://127.0.0.1:{free_port()}") as client:
        code, text = await refusal(client, "window_freeze", session_id="s", window_name="w")
        assert (code, "CWG_URL" in text) == ("gateway_unreachable", True)


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "a test", "version": "1"},
    },
}
ACCEPT = {"accept": "application/json, text/event-stream"}


def post(gateway: Gateway, body: Any, **headers: str) -> httpx.Response:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return gateway.http.post("/mcp", content=given, headers={"content-type": "application/json", **ACCEPT, **headers})


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("headers", [{"x-api-key": "wrong"}, {"x-api-key": ""}, {"x-api-key": "", "cookie": KEY}])
async def test_without_the_key_nothing_is_answered(guarded: Gateway, headers: dict[str, str]) -> None:
    response = post(guarded, INITIALIZE, **headers)
    assert code_of(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_any_host_is_served_and_pages_of_others_are_not(gateway: Gateway) -> None:
    assert post(gateway, INITIALIZE, host="gateway.example:8700").status_code == 200
    own = post(gateway, INITIALIZE, host="gateway.example", origin="https://gateway.example")
    assert own.status_code == 200
    assert code_of(post(gateway, INITIALIZE, origin="https://evil.example")) == (403, "forbidden")
    assert code_of(post(gateway, INITIALIZE, origin="null")) == (403, "forbidden")


async def test_what_is_no_mcp_is_refused(gateway: Gateway) -> None:
    before = len(gateway.log)
    for method in ("GET", "DELETE", "PUT"):
        response = gateway.http.request(method, "/mcp", headers=ACCEPT)
        assert (code_of(response), response.headers["allow"]) == ((405, "method_not_allowed"), "POST")
    assert code_of(post(gateway, b"x" * (2**20 + 1))) == (413, "payload_too_large")
    for body in (b"", b"{", b"[]", b"[" * 100_000, b'{"jsonrpc": "1.0"}', b"\xff", b"null"):
        for version in ({}, {"mcp-protocol-version": "2026-07-28"}, {"mcp-protocol-version": "1999-01-01"}):
            response = post(gateway, body, **version)
            assert 400 <= response.status_code < 500, (body[:20], version, response.text)
    assert code_of(gateway.http.get("/mcp/")) == (404, "not_found")
    assert "Traceback" not in gateway.log[before:]


async def test_a_gateway_that_served_mcp_ends_as_any_other(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_before(engine.url, tmp_path, workers=2) as gateway:
        for _ in range(6):  # new connections, so both workers get some
            async with over_http(gateway.url, "legacy") as client:
                assert (await answer(client, "window_list"))["total"] == 0
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log
