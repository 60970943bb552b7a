"""The ways in besides HTTP: the official MCP client, and `cwg` in a terminal."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult

from tests.stack.driver import Gateway
from tests.support.gateway_process import ROOT, environment

Ended = subprocess.CompletedProcess[str]


def mcp(gateway: Gateway, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """Call a tool over streamable HTTP, and insist that it worked."""
    return _answer(asyncio.run(_over_http(gateway, tool, arguments)))


def mcp_over_stdio(gateway: Gateway, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Call tools through `cwg mcp`, as an agent starts it, and insist that they worked."""
    return [_answer(result) for result in asyncio.run(_over_stdio(gateway, calls))]


def mcp_refused(gateway: Gateway, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """Call a tool that fails; return the error."""
    result = asyncio.run(_over_http(gateway, tool, arguments))
    assert result.is_error, result.structured_content
    assert result.structured_content is not None
    return dict(result.structured_content["error"])


def cwg(gateway: Gateway, *arguments: str) -> Ended:
    """Run one command of the CLI."""
    command = [sys.executable, "-m", "gateway", *arguments]
    given = environment({"CWG_URL": gateway.url})
    return subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


async def _over_http(gateway: Gateway, tool: str, arguments: dict[str, Any]) -> CallToolResult:
    async with (
        httpx2.AsyncClient(timeout=60) as http,
        Client(streamable_http_client(f"{gateway.url}/mcp", http_client=http)) as client,
    ):
        return await client.call_tool(tool, arguments)


async def _over_stdio(gateway: Gateway, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[CallToolResult]:
    given = environment({"CWG_URL": gateway.url})
    server = StdioServerParameters(command=sys.executable, args=["-m", "gateway", "mcp"], env=given, cwd=ROOT)
    async with Client(stdio_client(server)) as client:
        return [await client.call_tool(tool, arguments) for tool, arguments in calls]


def _answer(result: CallToolResult) -> dict[str, Any]:
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return dict(result.structured_content)
