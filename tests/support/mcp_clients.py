"""The official client of MCP, over both transports, before a gateway."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from tests.support.gateway_process import ROOT, environment


@asynccontextmanager
async def over_http(url: str, mode: str = "auto", timeout: float = 15, **headers: str) -> AsyncIterator[Client]:
    """A client of /mcp, of one generation of the protocol, that sends these headers."""
    async with httpx2.AsyncClient(headers=headers, timeout=timeout) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


@asynccontextmanager
async def over_stdio(url: str, mode: str = "auto", key: str = "", session_id: str = "") -> AsyncIterator[Client]:
    """A client of `cwg mcp`."""
    given = environment({"CWG_URL": url, "CWG_API_KEY": key, "CWG_SESSION_ID": session_id})
    server = StdioServerParameters(command=sys.executable, args=["-m", "gateway", "mcp"], env=given, cwd=ROOT)
    async with Client(stdio_client(server), mode=mode) as client:
        yield client
