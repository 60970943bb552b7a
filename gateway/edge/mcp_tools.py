"""The verbs as tools of MCP: a table over the admin API, and how a call of a tool becomes a request there.

Every rule about a verb stays with the admin API; here is what a model reads before it calls one, and nothing else. What
a tool declares, it takes: a placeholder of the route goes into the path, the rest into the query or the body.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, unquote

from gateway.edge import fields
from gateway.edge import mcp_answers as answers
from gateway.edge import mcp_params as params
from gateway.edge.health import COMPONENTS
from gateway.edge.mcp_params import AdminRequest, Json, Param
from gateway.errors import GatewayError
from gateway.records import check_window_name
from gateway.store.contract import SORT_KEYS

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: which admin routes it stands for (the one whose placeholders are given), and what it answers."""

    name: str
    routes: tuple[str, ...]
    about: str
    params: Mapping[str, Param]
    answer: Json
    shape: Callable[[Json], Json] = lambda answer: answer
    defaults: Mapping[str, Any] = field(default_factory=dict)
    destroys: bool = False

    @property
    def reads_only(self) -> bool:
        """Whether it changes nothing."""
        return all(route.startswith("GET ") for route in self.routes)

    @property
    def input_schema(self) -> Json:
        """What a client may send, as JSON schema."""
        required = [name for name, param in self.params.items() if param.required]
        properties = {name: param.schema for name, param in self.params.items()}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def request(self, arguments: Mapping[str, Any]) -> AdminRequest:
        """Turn a call into a request to the admin API. Raises `invalid_request` and its kin, naming the parameter."""
        given = {**self.defaults, **self._checked(arguments)}
        method, path = self._route(given).split(" ")
        in_path = set(_PLACEHOLDER.findall(path))
        for name in in_path:
            path = path.replace(f"{{{name}}}", quote(given[name], safe=""))
        sent = {
            (name if param.wire is None else param.wire): given[name]
            for name, param in self.params.items()
            if name in given and name not in in_path and param.wire != ""
        }
        if method in ("POST", "PUT", "PATCH"):
            return AdminRequest(method, path, body=sent)
        return AdminRequest(method, path, {name: params.as_query(value) for name, value in sent.items()})

    def _checked(self, arguments: Mapping[str, Any]) -> Json:
        names = {other: name for name, param in self.params.items() for other in (name, *param.also)}
        fields.refuse_unknown(arguments, names)
        given: Json = {}
        for other, value in arguments.items():
            name = names[other]
            if value is None:
                continue
            if name in given:
                raise GatewayError("invalid_request", f"{name} is given more than once", details={"field": name})
            given[name] = self.params[name].check(other, value)
        for name, param in self.params.items():
            if param.required and name not in given:
                raise GatewayError("invalid_request", f"{name} is missing", details={"field": name})
        return given

    def _route(self, given: Json) -> str:
        fit = [route for route in self.routes if given.keys() >= set(_PLACEHOLDER.findall(route))]
        if len(fit) == 1:
            return fit[0]
        names = " or ".join(name for route in self.routes for name in _PLACEHOLDER.findall(route))
        raise GatewayError("invalid_request", f"give exactly one of {names}", details={"field": names})


@dataclass(frozen=True, slots=True)
class Resource:
    """Something to read: `uri` may have one placeholder, which the route has too."""

    uri: str
    name: str
    about: str
    route: str

    def path(self, uri: str) -> str | None:
        """The path that answers for `uri`, or None if that is another resource. Raises `invalid_window_name`."""
        pattern = _PLACEHOLDER.sub("([^/]*)", re.escape(self.uri).replace(r"\{", "{").replace(r"\}", "}"))
        found = re.fullmatch(pattern, uri)
        if found is None:
            return None
        names = [check_window_name(unquote(part), "window name in the URI") for part in found.groups()]
        return self.route.format(name=quote(names[0], safe="")) if names else self.route


TOOLS: tuple[Tool, ...] = (
    Tool(
        "window_freeze",
        ("POST /admin/windows",),
        "Save a session's whole context as a named window that can be restored later without loss. Use it before "
        "a risky step, at a milestone, or when the context is nearly full. Costs seconds: the last reply is "
        "computed once more and KV is pinned; the session itself goes on unharmed. Waits shortly for a turn that "
        "is going on, else `session_busy`: then try again. Returns the window with a receipt of what was really "
        "stored; read `kv` and `warnings`.",
        {
            "session_id": params.session(required=True),
            "window_name": params.window(required=True),
            "description": params.description("what it is, for whoever finds it later"),
            "tags": params.tags(),
            "ttl_seconds": params.seconds("seconds it is kept for"),
        },
        answers.FROZEN,
    ),
    Tool(
        "window_thaw",
        ("POST /admin/windows/{window_name}/thaw",),
        "Restore a window into a new session, to go on from there. The window stays as it is and can be thawed "
        "any number of times. Costs the loading of its KV, and computing what is missing of it. Returns the new "
        "`session_id` (send it as header X-Session-ID, or use the base URL /s/SESSION_ID/v1) and a receipt: "
        "`cached_tokens` is what the engine really did not have to compute.",
        {
            "window_name": params.window(required=True),
            "new_session_id": params.session("id for the new session; made up if not given"),
            "warm_cache": params.warm(
                "how far up to load now: true or `gpu`: into the engine, and measured; `cpu`: into memory; false or "
                "`none`: with the first request. Default true",
                wire="warm",
                also=("warm",),
            ),
        },
        answers.THAWED,
        defaults={"warm_cache": "gpu"},
    ),
    Tool(
        "window_list",
        ("GET /admin/windows",),
        "Find windows, newest first unless sorted otherwise. Cheap. Filters are ANDed, tags too. Returns one line "
        "for each window, and `has_more` where `offset` would show more.",
        {
            "tags": params.tags("only with all of these tags"),
            "model": params.text(500)("only of this model"),
            "session_id": params.session("only frozen from this session"),
            "search": params.text(200)("only with this text in name or description"),
            "created_after": params.text(64)("ISO 8601 date or time"),
            "created_before": params.text(64)("ISO 8601 date or time"),
            "sort_by": params.one_of(*SORT_KEYS, total_size_bytes="size")("default created_at"),
            "sort_order": params.one_of("asc", "desc")("default desc"),
            "limit": params.limit("how many to answer with"),
            "offset": params.offset("how many to leave out first"),
        },
        answers.WINDOWS,
    ),
    Tool(
        "window_status",
        ("GET /admin/windows/{window_name}", "GET /admin/sessions/{session_id}"),
        "Look closely at one window or at one session; give exactly one of the two. Cheap, but for "
        "`include_blocks`, which lists every KV object. Returns for a window its tokens, where its bytes are now "
        "by tier, and its receipt; for a session its state, tokens, context limit, last turns with cached tokens, "
        "and its windows.",
        {
            "window_name": params.window(),
            "session_id": params.session(),
            "include_blocks": params.flag("windows only: list every KV object"),
            "include_lineage": params.flag("windows only: its parent, ancestors and clones"),
            "include_cache_stats": params.flag("accepted; a window's cache is always told", wire=""),
        },
        answers.STATUS,
        shape=answers.typed,
    ),
    Tool(
        "window_clone",
        ("POST /admin/windows/{source_window}/clone",),
        "Give a window a second name, to branch off it or to keep it when the first is deleted. Cheap: no KV byte "
        "is copied. Returns the new window and `shared_blocks`.",
        {
            "source_window": params.window(required=True),
            "target_window": params.window("name of the clone", required=True, also=("new_window_name",)),
            "description": params.description("what it is, for whoever finds it later"),
            "tags": params.tags(),
        },
        answers.CLONED,
    ),
    Tool(
        "window_delete",
        ("DELETE /admin/windows/{window_name}",),
        "Delete a window for good. KV that other windows hold stays; sessions thawed from it go on. Cannot be "
        "undone. Returns how many KV objects went, and the bytes really freed.",
        {
            "window_name": params.window(required=True),
            "delete_blocks": params.one_of(True)("KV that nobody else holds always goes with it", wire=""),
            "force": params.flag("accepted; nothing asks for confirmation", wire=""),
        },
        answers.DELETED,
        destroys=True,
    ),
    Tool(
        "session_list",
        ("GET /admin/sessions",),
        "List conversations that the gateway knows, last active first; use it to find the session to freeze. Your "
        "own is likely the first. Cheap. Returns id, state, model and tokens of each.",
        {
            "state_filter": params.one_of("active", "frozen", "thawed", "expired")(
                "only in this state", wire="state", also=("state",)
            ),
            "model": params.text(500)("only of this model"),
            "limit": params.limit("how many to answer with"),
            "offset": params.offset("how many to leave out first"),
        },
        answers.SESSIONS,
    ),
    Tool(
        "cache_stats",
        ("GET /admin/metrics",),
        "Ask whether caching pays, and how much room the windows take. Cheap. Returns KV objects and bytes that "
        "windows hold, by tier, and `hit_rate`: the share of prompt tokens that the engine did not have to compute "
        "since the gateway started; null before the first.",
        {},
        answers.CACHE,
        shape=answers.cache_stats,
    ),
    Tool(
        "health_check",
        ("GET /admin/health",),
        "Tell whether engine, cache, tiers, store and the isolation of sessions are well. Use it when something "
        "fails. Cheap. Returns each component with its status and, where it is not well, a message.",
        {"component": params.one_of(*COMPONENTS, kv_store="cache", vllm="engine", registry="store")("only this one")},
        answers.HEALTH,
    ),
    Tool(
        "get_metrics_data",
        ("GET /admin/metrics",),
        "All counters of the gateway since it started: turns, tokens, cache hits, verbs, windows. Long; for a "
        "summary of the cache use cache_stats. Returns `metrics`, or with format `prometheus` the text for "
        "Prometheus in `content`.",
        {"format": params.one_of("json", "prometheus")("default json")},
        answers.METRICS,
    ),
)

RESOURCES: tuple[Resource, ...] = (
    Resource("cwg://windows", "windows", "The 100 newest windows.", "/admin/windows?limit=100"),
    Resource("cwg://sessions", "sessions", "The 100 sessions last active.", "/admin/sessions?limit=100"),
    Resource("cwg://stats", "stats", "Every counter of the gateway.", "/admin/metrics"),
    Resource("cwg://health", "health", "Health of every component.", "/admin/health"),
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


def resource_request(uri: str) -> AdminRequest:
    """What answers for a resource. Raises `not_found`."""
    ours = re.sub("^cwm://", "cwg://", uri)  # the replaced system's word
    for resource in RESOURCES:
        path = resource.path(ours)
        if path is not None:
            path, _, query = path.partition("?")
            return AdminRequest("GET", path, dict(pair.split("=") for pair in query.split("&") if pair))
    raise GatewayError("not_found", f"there is no resource {uri!r:.200}", hint="resources/list names them")
