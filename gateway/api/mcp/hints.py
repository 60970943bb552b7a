"""Hints of the admin API in the words of MCP: tools for routes, and a resource for a route that no tool has."""

from gateway.api.mcp.tools import RESOURCES, TOOLS
from gateway.errors import HintWords, placeholders_blank


def _names() -> dict[str, str]:
    resources = {placeholders_blank(f"GET {r.route}"): f"the resource `{r.uri}`" for r in RESOURCES}
    tools = {placeholders_blank(route): f"`{tool.name}`" for tool in TOOLS for route in tool.routes}
    return {**resources, **tools, "null": "an empty value (0 seconds)"}


# Only `cwg mcp` gets this error from the admin API: over HTTP, no tool is called without the key.
WORDS = HintWords(_names(), {"unauthorized": "set CWG_API_KEY to the gateway's key where `cwg mcp` is started"})
