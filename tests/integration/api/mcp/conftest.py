"""An MCP client of the shared gateway."""

from collections.abc import AsyncIterator

import pytest
from mcp import Client

from tests.support.gateway_process import Gateway
from tests.support.mcp_clients import over_http, over_stdio


@pytest.fixture(params=["http", "http-legacy", "stdio", "stdio-legacy"])
async def client(request: pytest.FixtureRequest, gateway: Gateway) -> AsyncIterator[Client]:
    """A client of the shared gateway, over each transport, in each generation of the protocol."""
    transport, _, era = request.param.partition("-")
    connect = over_http if transport == "http" else over_stdio
    async with connect(gateway.url, era or "auto") as client:
        yield client
