"""The MCP server behind both transports: it reads the table of tools and calls the admin API."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mcp_types as types
import orjson
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from gateway import __version__
from gateway.api.endpoint import error_shape
from gateway.api.mcp.admin_request import Ask, Json, ReportProgress
from gateway.api.mcp.hints import WORDS
from gateway.api.mcp.tool import Resource, Tool
from gateway.api.mcp.tools import RESOURCES, TOOLS, resource_request, tool_named
from gateway.errors import GatewayError
from gateway.telemetry import trace_context

Context = ServerRequestContext[Any, Any]
AskOf = Callable[[Context], Ask]

_RESOURCE_NOT_FOUND = -32002
_NO_SUCH_RESOURCE = ("not_found", "window_not_found")

INSTRUCTIONS = (
    "This gateway is between clients and a vLLM engine, and stores conversations. A session is a live conversation; a "
    "window is a frozen, named copy of one, with its KV cache. session_current tells which is yours: freeze it with "
    "window_freeze before you risk or exhaust its context, find windows with window_list, and continue from one with "
    "window_thaw: you get the very same context, not a summary. Every answer has what was measured; read its warnings."
)


def server(ask_of: AskOf) -> Server[Any]:
    """A server that calls the admin API; `ask_of` makes the client for a request."""

    async def list_tools(_: Context, page: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        _refuse_cursor(page)
        return types.ListToolsResult(tools=[_tool(tool) for tool in TOOLS])

    async def call_tool(ctx: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = _tool_named(params.name)
        arguments = params.arguments or {}
        try:
            request = tool.request(arguments)
        except GatewayError as error:
            return _failed(error_shape(error))
        request = replace(request, traceparent=_traceparent(params))
        answer = await ask_of(ctx)(request, _report_to(ctx))
        return _failed(answer) if "error" in answer else _done(tool.result(answer, arguments))

    async def list_resources(_: Context, page: types.PaginatedRequestParams | None) -> types.ListResourcesResult:
        _refuse_cursor(page)
        return types.ListResourcesResult(resources=[_resource(r) for r in RESOURCES if "{" not in r.uri])

    async def list_templates(
        _: Context, page: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        _refuse_cursor(page)
        return types.ListResourceTemplatesResult(resource_templates=[_template(r) for r in RESOURCES if "{" in r.uri])

    async def read_resource(ctx: Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
        try:
            request, resource = resource_request(params.uri)
        except GatewayError as error:
            raise _resource_error(error_shape(error), ctx.protocol_version) from error
        answer = await ask_of(ctx)(request, _report_to(ctx))
        if "error" in answer:
            raise _resource_error(answer, ctx.protocol_version)
        text = orjson.dumps(resource.shape(answer)).decode()
        return types.ReadResourceResult(
            contents=[types.TextResourceContents(uri=params.uri, mime_type="application/json", text=text)]
        )

    return Server(
        "context-window-gateway",
        version=__version__,
        title="Context Window Gateway",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read_resource,
    )


def over_http(ask_of: AskOf, max_body_bytes: int) -> StreamableHTTPSessionManager:
    """The server for HTTP requests, whose key, origin and size `McpTransport` has checked.

    It keeps no state between requests, so any worker can serve any of them.
    """
    checked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    return StreamableHTTPSessionManager(
        server(ask_of), stateless=True, security_settings=checked, max_request_body_size=max_body_bytes
    )


async def over_stdio(ask: Ask) -> None:
    """Serve stdin and stdout until the client closes them."""
    served = server(lambda _: ask)
    async with stdio_server() as (read, write):
        await served.run(read, write, served.create_initialization_options())


def _tool(tool: Tool) -> types.Tool:
    annotations = types.ToolAnnotations(
        read_only_hint=tool.reads_only, destructive_hint=tool.destroys, idempotent_hint=False, open_world_hint=False
    )
    return types.Tool(
        name=tool.name,
        description=str(tool.about),
        input_schema=tool.input_schema,
        output_schema=tool.output_schema,
        annotations=annotations,
    )


def _resource(resource: Resource) -> types.Resource:
    return types.Resource(
        uri=resource.uri, name=resource.name, description=resource.about, mime_type="application/json"
    )


def _template(resource: Resource) -> types.ResourceTemplate:
    return types.ResourceTemplate(
        uri_template=resource.uri, name=resource.name, description=resource.about, mime_type="application/json"
    )


def _traceparent(params: types.CallToolRequestParams) -> str:
    """The W3C trace context of a call, in its `_meta` (MCP's SEP-414); "" without a valid one."""
    given = (params.meta or {}).get("traceparent")
    valid = isinstance(given, str) and given.isascii() and trace_context.parse(given.encode())
    return str(given) if valid else ""


def _tool_named(name: str) -> Tool:
    try:
        return tool_named(name)
    except GatewayError as error:
        raise _protocol_error(error_shape(error)) from error


def _done(answer: Json) -> types.CallToolResult:
    text = types.TextContent(type="text", text=orjson.dumps(answer).decode())
    return types.CallToolResult(content=[text], structured_content=answer)


def _failed(answer: Json) -> types.CallToolResult:
    error = _translated(answer["error"])
    text = types.TextContent(type="text", text=_as_text(error))
    return types.CallToolResult(content=[text], structured_content={"success": False, "error": error}, is_error=True)


def _protocol_error(answer: Json) -> MCPError:
    error = _translated(answer["error"])
    ours = error["code"] in ("internal", "gateway_unreachable") or error["retryable"]
    return MCPError(types.INTERNAL_ERROR if ours else types.INVALID_PARAMS, _as_text(error), error)


def _resource_error(answer: Json, protocol_version: str) -> MCPError:
    """The error for a resource that cannot be read. Up to 2025-11-25 one that does not exist has a code of its own."""
    error = _protocol_error(answer)
    if answer["error"]["code"] not in _NO_SUCH_RESOURCE or protocol_version in MODERN_PROTOCOL_VERSIONS:
        return error
    return MCPError(_RESOURCE_NOT_FOUND, error.error.message, error.error.data)


def _refuse_cursor(page: types.PaginatedRequestParams | None) -> None:
    """Raise the error for any cursor: every list has one page."""
    if page is not None and page.cursor is not None:
        refused = GatewayError("invalid_request", f"unknown cursor {page.cursor!r:.100}", hint="there is one page")
        raise _protocol_error(error_shape(refused))


def _translated(error: Json) -> Json:
    return {**error, "hint": WORDS.translate(error["code"], error["hint"])}


def _as_text(error: Json) -> str:
    hint = f" ({error['hint']})" if error["hint"] else ""
    return f"{error['code']}: {error['message']}{hint}"


def _report_to(ctx: Context) -> ReportProgress:
    """Report progress as MCP defines it: a number that only grows, here of steps, and a message."""
    steps = itertools.count(1)

    async def report(step: Any) -> None:
        of_total = f" {step['done']}/{step['total']}" if step["total"] else ""
        await ctx.session.report_progress(next(steps), None, f"{step['stage']}{of_total}")

    return report
