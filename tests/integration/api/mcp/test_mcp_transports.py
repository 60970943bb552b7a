"""MCP over HTTP and stdio: keys, origins, and input that is not MCP."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mcp import MCPError

from tests.support.fakes.engine import FakeEngine
from tests.support.gateway_process import ROOT, Gateway, environment, free_port, gateway_in_front_of
from tests.support.mcp_answers import ACCEPT, answer, code_of, post, refusal
from tests.support.mcp_clients import over_http, over_stdio

pytestmark = pytest.mark.anyio


KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def guarded(shared_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a key."""
    with gateway_in_front_of(shared_engine.url, tmp_path_factory.mktemp("guarded-mcp"), api_key=KEY) as gateway:
        yield gateway


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}])
async def test_the_key_is_required_by_mcp_and_by_the_admin_api_behind_it(
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


async def test_stdio_reports_that_no_gateway_answers() -> None:
    async with over_stdio(f"http://127.0.0.1:{free_port()}") as client:
        code, text = await refusal(client, "window_freeze", session_id="s", window_name="w")
        assert (code, "CWG_URL" in text) == ("gateway_unreachable", True)
        with pytest.raises(MCPError, match="gateway_unreachable: no gateway answers at"):
            await client.read_resource("cwg://windows")


@pytest.mark.parametrize(
    ("key", "line"), [("", "no gateway answers at URL: "), ("wrong", "the API key is missing or wrong")]
)
def test_stdio_fails_at_once_where_it_cannot_work(guarded: Gateway, key: str, line: str) -> None:
    url = guarded.url if key else f"http://127.0.0.1:{free_port()}"
    with mcp_process(url, key) as process:
        assert process.stderr is not None
        said = process.stderr.readline().decode()
    assert said.startswith(f"cwg mcp: {line.replace('URL', url)}")
    assert said.endswith("; every call retries\n")


def test_started_in_a_terminal_it_says_what_it_waits_for(gateway: Gateway) -> None:
    terminal, stdin = os.openpty()
    try:
        with mcp_process(gateway.url, stdin=stdin) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"cwg mcp: waiting for MCP on stdin")
    finally:
        os.close(stdin)
        os.close(terminal)


NO_MCP = (b"", b"no json", b"[]", b"null", b"[" * 100_000, b"x" * 2**21, b"\xff\xfe", b'{"jsonrpc": "1.0"}', b"{}")


def test_stdio_continues_after_input_that_is_not_mcp(gateway: Gateway) -> None:
    call = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "window_list", "arguments": {}}}
    ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    with mcp_process(gateway.url) as process:
        sent = [
            *NO_MCP,
            json.dumps(INITIALIZE).encode(),
            *NO_MCP,
            json.dumps(ready).encode(),
            json.dumps(call).encode(),
        ]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"".join(line + b"\n" for line in sent))
        process.stdin.flush()
        answers = (json.loads(line) for line in process.stdout)
        listed = next(line for line in answers if line.get("id") == 2)
        assert "windows" in listed["result"]["structuredContent"], listed
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")


@contextmanager
def mcp_process(url: str, key: str = "", stdin: int = subprocess.PIPE) -> Iterator["subprocess.Popen[bytes]"]:
    """`cwg mcp` on pipes."""
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "gateway", "mcp"]
    env = environment({"CWG_URL": url, "CWG_API_KEY": key})
    with subprocess.Popen(command, env=env, cwd=ROOT, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "a test", "version": "1"}},
}


@pytest.mark.parametrize("headers", [{"x-api-key": "wrong"}, {"x-api-key": ""}, {"x-api-key": "", "cookie": KEY}])
async def test_without_the_key_nothing_is_answered(guarded: Gateway, headers: dict[str, str]) -> None:
    response = post(guarded, INITIALIZE, **headers)
    assert code_of(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_any_host_is_served_with_a_key_and_pages_of_others_are_not(guarded: Gateway) -> None:
    assert post(guarded, INITIALIZE, host="gateway.example:8700").status_code == 200
    own = post(guarded, INITIALIZE, host="gateway.example", origin="https://gateway.example")
    assert own.status_code == 200
    assert code_of(post(guarded, INITIALIZE, origin="https://evil.example")) == (403, "forbidden")
    for origin in ("null", "http://[::1", "//gateway.example"):
        assert code_of(post(guarded, INITIALIZE, origin=origin)) == (403, "forbidden")


async def test_a_request_that_is_not_mcp_is_refused(gateway: Gateway) -> None:
    before = len(gateway.log)
    for method in ("GET", "DELETE", "PUT"):
        response = gateway.http.request(method, "/mcp", headers=ACCEPT)
        assert (code_of(response), response.headers["allow"]) == ((405, "method_not_allowed"), "POST")
    assert code_of(post(gateway, b"x" * (2**20 + 1))) == (413, "payload_too_large")
    for body in (b"", b"{", b"[]", b"[" * 100_000, b'{"jsonrpc": "1.0"}', b"\xff", b"null"):
        for version in ({}, {"mcp-protocol-version": "2026-07-28"}, {"mcp-protocol-version": "1999-01-01"}):
            response = post(gateway, body, **version)
            assert 400 <= response.status_code < 500, (body[:20], version, response.text)
    batch = post(gateway, b'[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', **{"mcp-protocol-version": "2025-03-26"})
    assert code_of(batch) == (400, "invalid_request")
    assert batch.json()["error"]["hint"] == "send one message in each request"
    assert post(gateway, INITIALIZE, path="/mcp/").text == post(gateway, INITIALIZE).text
    assert code_of(gateway.http.get("/mcp/")) == (405, "method_not_allowed")
    assert "Traceback" not in gateway.log[before:]


async def test_a_gateway_that_served_mcp_ends_as_any_other(engine: FakeEngine, tmp_path: Path) -> None:
    with gateway_in_front_of(engine.url, tmp_path, workers=2) as gateway:
        for _ in range(6):  # new connections, so both workers get some
            async with over_http(gateway.url, "legacy") as client:
                assert (await answer(client, "window_list"))["total"] == 0
        assert gateway.stop() == 0
        assert "Traceback" not in gateway.log
