"""Answers and refusals of MCP tools."""

import json
from typing import Any

import httpx
import jsonschema
from mcp import Client
from mcp_types import CallToolResult, TextContent

from gateway.api.mcp.tools import tool_named
from tests.support.gateway_process import Gateway


async def answer(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool that succeeds. What it answers for programs and for models is the same."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    structured = result.structured_content
    assert isinstance(structured, dict)
    assert structured["success"] is True
    jsonschema.validate(structured, tool_named(tool).output_schema)
    assert json.loads(text_of(result)) == structured
    return structured


async def refusal(client: Client, tool: str, **arguments: Any) -> tuple[str, str]:
    """Call a tool that fails; return the code, and what the model reads."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    assert result.structured_content is not None
    assert set(result.structured_content) == {"success", "error"}
    assert result.structured_content["success"] is False
    error = result.structured_content["error"]
    assert set(error) == {"code", "message", "hint", "retryable", "details"}
    jsonschema.validate(result.structured_content, tool_named(tool).output_schema)  # as clients in TypeScript do
    text = text_of(result)
    assert text.startswith(f"{error['code']}: {error['message']}")
    assert error["hint"] in text
    assert len(text) < 2000
    return error["code"], text


def text_of(result: CallToolResult) -> str:
    [content] = result.content
    assert isinstance(content, TextContent)
    return content.text


ACCEPT = {"accept": "application/json, text/event-stream"}


def post(gateway: Gateway, body: Any, path: str = "/mcp", **headers: str) -> httpx.Response:
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    return gateway.http.post(path, content=given, headers={"content-type": "application/json", **ACCEPT, **headers})


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]
