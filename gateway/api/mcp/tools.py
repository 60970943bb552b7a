"""The window operations as MCP tools, and the resources: a table over the admin API, which has all the rules.

Arguments that the route has a placeholder for go into the path, the others into the query or the body.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from gateway.api.admin.models import ledger, requests, responses, status
from gateway.api.mcp import answers, arguments, old_fields
from gateway.api.mcp import autofreeze_tools as autofreeze
from gateway.api.mcp import window_tools as windows
from gateway.api.mcp.admin_request import AdminRequest
from gateway.api.mcp.tool import About, Resource, Tool
from gateway.api.requests import Request
from gateway.errors import GatewayError

_SESSIONS = (
    Tool(
        "session_list",
        ("GET /admin/sessions",),
        About(
            "List the gateway's conversations, last active first",
            "to find a session; which one is yours, session_current says",
            "cheap; some 150 tokens for each session in the answer, so set `limit`",
            "`sessions` with id, `state`, model and tokens of each, and `has_more` where `offset` would show more",
        ),
        arguments.SessionList,
        (answers.Sessions,),
        shape=old_fields.sessions,
    ),
    Tool(
        "session_current",
        ("GET /admin/current-session",),
        About(
            "Tell which session you are in, by the id that your client sends. Nothing is guessed",
            "before you freeze yourself",
            "cheap",
            "`session_id`, null where it is unknown, and a `message` that says how to find out",
        ),
        Request,
        (answers.CurrentSession,),
        brief=("sessions",),
        shape=answers.current_session,
    ),
    Tool(
        "session_delete",
        ("DELETE /admin/sessions/{session_id}",),
        About(
            "Forget a session: its turns, its text and the KV that no window holds. Its windows stay",
            "for branches that led nowhere; it cannot be undone",
            "next to nothing; a conversation that continues starts over and is computed again",
            "`deleted`, and `space_freed_bytes` as actually freed",
        ),
        arguments.Session,
        (responses.SessionDeleted,),
        destroys=True,
    ),
)

_MONITORING = (
    Tool(
        "cache_stats",
        ("GET /admin/cache",),
        About(
            "Show how much KV is in each tier, for whom, and how much of the prompts came from the cache",
            "to see whether caching pays, and how much room windows and sessions take",
            "lists every object on disk and in Redis: up to a second, no tokens",
            "`total_blocks` and `total_bytes`, the same by `tiers`, and `hit_rate`: the share of prompt tokens that "
            "the engine did not have to compute since the gateway started; null before the first",
        ),
        Request,
        (answers.CacheStats,),
        brief=("tiers",),
        shape=old_fields.cache_stats,
    ),
    Tool(
        "savings",
        ("GET /admin/ledger",),
        About(
            "Tell how many tokens and about how many seconds of computing the cache has saved",
            "to see whether windows pay, and which do",
            "cheap",
            "`total` with `tokens`, `seconds_estimated` and its `error_share`, and what windows hold",
        ),
        arguments.Savings,
        (ledger.Ledger,),
        brief=("turns", "thaws", "asks", "windows", "sessions", "held", "curves"),
        always=frozenset({"limit"}),
    ),
    Tool(
        "health_check",
        ("GET /admin/health",),
        About(
            "Check the engine, the cache, its tiers, the store and the isolation of sessions",
            "when something fails, or before something that must not",
            "cheap",
            "`status`, and `components`, each with its status and a message",
        ),
        arguments.HealthCheck,
        (answers.Health,),
        brief=("by_name",),
        shape=old_fields.health,
    ),
    Tool(
        "get_metrics_data",
        ("GET /admin/metrics",),
        About(
            "All counters of the gateway since it started: turns, tokens, cache hits, operations, windows",
            "to measure something; for a summary of the cache use cache_stats",
            "cheap to make and long to read: 5,000 tokens and more",
            "`metrics`, or with `format` `prometheus` the text for Prometheus in `content`",
        ),
        requests.MetricsQuery,
        (status.JsonMetrics, status.PrometheusMetrics),
    ),
)

TOOLS: tuple[Tool, ...] = (*windows.TOOLS, *_SESSIONS, *_MONITORING, *autofreeze.TOOLS)

# `also`: as in the replaced system's code. Its documents had our names, under `cwm:`.
RESOURCES: tuple[Resource, ...] = (
    Resource(
        "cwg://windows", "windows", "The 100 newest windows.", "/admin/windows?limit=100", also=("windows://list",)
    ),
    Resource(
        "cwg://sessions",
        "sessions",
        "The 100 sessions last active.",
        "/admin/sessions?limit=100",
        also=("sessions://list",),
    ),
    Resource(
        "cwg://stats",
        "stats",
        "What is in the cache, and its hit rate, as cache_stats returns them.",
        "/admin/cache",
        old_fields.cache_stats,
        also=("stats://cache",),
    ),
    Resource(
        "cwg://health",
        "health",
        "Health of every component.",
        "/admin/health",
        old_fields.health,
        also=("health://status",),
    ),
    Resource("cwg://windows/{name}/messages", "messages", "The text of a window.", "/admin/windows/{name}/messages"),
)

TOOLS_BY_NAME: Mapping[str, Tool] = MappingProxyType({tool.name: tool for tool in TOOLS})


def tool_named(name: str) -> Tool:
    """The tool of that name. Raises `not_found`, naming all tools."""
    tool = TOOLS_BY_NAME.get(name)
    if tool is None:
        hint = f"tools are {', '.join(TOOLS_BY_NAME)}"
        raise GatewayError("not_found", f"there is no tool {name!r:.100}", hint=hint)
    return tool


def resource_request(uri: str) -> tuple[AdminRequest, Resource]:
    """The request for a resource, and the resource. Raises `not_found`."""
    ours = re.sub("^cwm://", "cwg://", uri)
    for resource in RESOURCES:
        path = resource.path(ours)
        if path is not None:
            path, _, query = path.partition("?")
            return AdminRequest("GET", path, dict(pair.split("=") for pair in query.split("&") if pair)), resource
    raise GatewayError("not_found", f"there is no resource {uri!r:.200}", hint="resources/list names them")
