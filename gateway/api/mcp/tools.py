"""The window operations as MCP tools, and the resources: a table over the admin API, which has all the rules.

What a tool declares, it takes: a placeholder of the route goes into the path, the rest into the query or the body.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from gateway.api.admin import models
from gateway.api.health import COMPONENTS
from gateway.api.mcp import answers
from gateway.api.mcp import autofreeze_tools as autofreeze
from gateway.api.mcp import parameters as params
from gateway.api.mcp import window_tools as windows
from gateway.api.mcp.parameters import AdminRequest
from gateway.api.mcp.tool import About, Resource, Tool
from gateway.errors import GatewayError

_SESSIONS = (
    Tool(
        "session_list",
        ("GET /admin/sessions",),
        About(
            "List conversations that the gateway knows, last active first",
            "to find the session to freeze; your own is likely the first",
            "cheap; some 150 tokens for each session in the answer, so set `limit`",
            "`sessions` with id, `state`, model and tokens of each, and `has_more` where `offset` would show more",
        ),
        {
            "state_filter": params.one_of("active", "frozen", "thawed", "expired")(
                "only in this state", wire="state", also=("state",)
            ),
            "model": params.text(500)("only of this model"),
            "limit": params.limit("how many to answer with"),
            "offset": params.offset("how many to leave out first"),
        },
        (models.Sessions,),
    ),
    Tool(
        "session_delete",
        ("DELETE /admin/sessions/{session_id}",),
        About(
            "Forget a session: its turns, its text and the KV that no window holds. Its windows stay",
            "for branches that led nowhere; it cannot be undone",
            "next to nothing; a conversation that goes on begins anew and is computed anew",
            "`deleted`, and `space_freed_bytes` as really freed",
        ),
        {"session_id": params.session(required=True)},
        (models.SessionDeleted,),
        destroys=True,
    ),
)

_SEEING = (
    Tool(
        "cache_stats",
        ("GET /admin/cache",),
        About(
            "Tell how much KV lies in each tier, for whom, and how much of the prompts came from the cache",
            "to see whether caching pays, and how much room windows and sessions take",
            "looks at every object on disk and in Redis: up to a second, no tokens",
            "`total_blocks` and `total_bytes`, the same by `tiers`, and `hit_rate`: the share of prompt tokens that "
            "the engine did not have to compute since the gateway started; null before the first",
        ),
        {},
        (answers.CacheStats,),
        brief=("tiers",),
        shape=answers.cache_stats,
    ),
    Tool(
        "health_check",
        ("GET /admin/health",),
        About(
            "Tell whether engine, cache, tiers, store and the isolation of sessions are well",
            "when something fails, or before something that must not",
            "cheap",
            "`status`, and `components`, each with its status and, where it is not well, a message",
        ),
        {"component": params.one_of(*COMPONENTS, kv_store="cache", vllm="engine", registry="store")("only this one")},
        (models.Health,),
    ),
    Tool(
        "get_metrics_data",
        ("GET /admin/metrics",),
        About(
            "All counters of the gateway since it started: turns, tokens, cache hits, verbs, windows",
            "to measure something; for a summary of the cache use cache_stats",
            "cheap to make and long to read: 5,000 tokens and more",
            "`metrics`, or with `format` `prometheus` the text for Prometheus in `content`",
        ),
        {"format": params.one_of("json", "prometheus")("default json")},
        (models.JsonMetrics, models.PrometheusMetrics),
    ),
)

TOOLS: tuple[Tool, ...] = (*windows.TOOLS, *_SESSIONS, *_SEEING, *autofreeze.TOOLS)

# `also`: as the replaced system's code had it. Its documents had the same names as we have, under `cwm:`.
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
        "What lies in the cache, and how much it was hit: as cache_stats says.",
        "/admin/cache",
        answers.cache_stats,
        also=("stats://cache",),
    ),
    Resource("cwg://health", "health", "Health of every component.", "/admin/health", also=("health://status",)),
    Resource("cwg://windows/{name}/messages", "messages", "The text of a window.", "/admin/windows/{name}/messages"),
)

TOOLS_BY_NAME: Mapping[str, Tool] = MappingProxyType({tool.name: tool for tool in TOOLS})


def tool_named(name: str) -> Tool:
    """The tool of that name. Raises `not_found`, naming those that there are."""
    tool = TOOLS_BY_NAME.get(name)
    if tool is None:
        known = ", ".join(TOOLS_BY_NAME)
        raise GatewayError("not_found", f"there is no tool {name!r:.100}", hint=f"tools are {known}")
    return tool


def resource_request(uri: str) -> tuple[AdminRequest, Resource]:
    """What answers for a resource, and which that is. Raises `not_found`."""
    ours = re.sub("^cwm://", "cwg://", uri)
    for resource in RESOURCES:
        path = resource.path(ours)
        if path is not None:
            path, _, query = path.partition("?")
            return AdminRequest("GET", path, dict(pair.split("=") for pair in query.split("&") if pair)), resource
    raise GatewayError("not_found", f"there is no resource {uri!r:.200}", hint="resources/list names them")
