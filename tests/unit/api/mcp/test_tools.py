"""The table of tools itself: what a model reads of each, and what a call becomes under whatever names it has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gateway.api.mcp.admin_request import AdminRequest
from gateway.api.mcp.tool import Tool
from gateway.api.mcp.tools import RESOURCES, TOOLS, tool_named
from gateway.errors import CODES, GatewayError
from gateway.windows.autofreeze import rules
from tests.support.gateway_process import ROOT

_TOLD = re.compile(
    r"(?P<does>[A-Z].{15,}?)\. Use it (?P<use>.{15,}?)\. Cost: (?P<cost>.{5,}?)\. Returns (?P<returns>.{5,})\."
)
_MOST_BYTES = 50_000  # of tools/list: an agent pays for it in each conversation
by_name = pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)


def unread(description: str, tool: Tool) -> list[str]:
    """What is wrong with a description, for a model that has nothing else."""
    if not _TOLD.fullmatch(description):
        return ["it does not say what it does, when to use it, what it costs, and what it returns"]
    known = {*words_of(tool.answer), *words_of(tool.input_schema), *CODES}
    unknown = [word for word in re.findall(r"`([^`]+)`", description) if word not in known]
    tools = re.findall(r"\b[a-z]+_[a-z_]+\b", re.sub("`[^`]+`", "", description))
    unknown += [word for word in tools if word not in {other.name for other in TOOLS}]
    return [*(f"{word} is nothing that it takes, answers or raises" for word in unknown), *length(description)]


def length(description: str) -> list[str]:
    return [] if len(description) < 700 else [f"it has {len(description)} characters"]


def words_of(schema: Any) -> Iterator[str]:
    """Every name and every value that a schema speaks of."""
    if isinstance(schema, dict):
        yield from schema.get("properties", ())
        yield from (str(value) for value in schema.get("enum", ()))
        yield from (word for inner in schema.values() for word in words_of(inner))
        yield from re.findall(r"`([^`]+)`", str(schema.get("description", "")))
    elif isinstance(schema, list):
        yield from (word for inner in schema for word in words_of(inner))


def open_ended(schema: dict[str, Any]) -> bool:
    """Whether a client may send more of it than we would take."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    bounds = {
        "string": ("maxLength", "pattern", "enum"),
        "integer": ("maximum",),
        "number": ("maximum", "exclusiveMaximum"),
        "array": ("maxItems",),
        "object": ("additionalProperties",),
    }
    return any(kind in bounds and not any(bound in schema for bound in bounds[kind]) for kind in kinds)


@by_name
def test_each_tool_describes_its_effect_use_cost_and_result(tool: Tool) -> None:
    assert unread(str(tool.about), tool) == []


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ("Save a session as a window.", "does not say"),
        ("Save a session as a named window. Use it before a risky step. Returns the window.", "does not say"),
        ("Save a session as a window. Use it before a risky step. Cost: cheap. Returns `nonsense`.", "nonsense"),
        ("Save a session as a window. Use it before window_melt. Cost: cheap. Returns a window.", "window_melt"),
        (f"Save a session as a window. Use it before a {'risk' * 200}. Cost: cheap. Returns a window.", "characters"),
    ],
)  # fmt: skip
def test_a_description_that_tells_too_little_or_nonsense_is_found(description: str, why: str) -> None:
    [found] = unread(description, tool_named("window_freeze"))
    assert why in found


@by_name
def test_every_parameter_is_described_and_bounded_and_nothing_else_is_taken(tool: Tool) -> None:
    schema = tool.input_schema
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator.check_schema(tool.output_schema)
    assert not jsonschema.Draft202012Validator(tool.output_schema).is_valid({})
    assert schema["additionalProperties"] is False
    for name, one in schema["properties"].items():
        assert one["description"], name
        assert not open_ended(one), name
    with pytest.raises(GatewayError) as caught:
        tool.request({"no_such": 1})
    assert caught.value.code == "unknown_parameter"


def test_what_all_tools_cost_a_model_to_read_is_bounded() -> None:
    listed = [{"name": t.name, "description": str(t.about), "inputSchema": t.input_schema} for t in TOOLS]
    assert len(json.dumps(listed)) < _MOST_BYTES / 2
    assert len(json.dumps([*listed, *(t.output_schema for t in TOOLS)])) < _MOST_BYTES


def test_the_docs_name_every_tool_resource_and_parameter() -> None:
    section = Path(ROOT, "docs/mcp.md").read_text()
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    for tool in TOOLS:
        row = next(line for line in section.splitlines() if line.startswith("| ") and f"`{tool.name}`" in line)
        assert [name for name in tool.input_schema["properties"] if f"`{name}" not in row + section] == [], tool.name
    assert rows.keys() <= {tool.name for tool in TOOLS} | {"parameter"}
    assert [resource.uri for resource in RESOURCES if f"`{resource.uri}`" not in section] == []


# --- the words of the replaced system

SESSION, WINDOW = {"session_id": "s"}, {"window_name": "w"}
PUT = "/admin/policies"
OLD: list[tuple[str, dict[str, Any], AdminRequest]] = [
    ("window_clone", {"source_window": "a", "new_window_name": "b"},
     AdminRequest("POST", "/admin/windows/a/clone", body={"target_window": "b"})),
    ("window_list", {"sort_by": "total_size_bytes"}, AdminRequest("GET", "/admin/windows", {"sort_by": "size"})),
    ("window_list", {"sort_by": "size_bytes"}, AdminRequest("GET", "/admin/windows", {"sort_by": "size"})),
    ("window_freeze", {**SESSION, **WINDOW, "prompt_prefix": "x"},
     AdminRequest("POST", "/admin/windows", body={**SESSION, **WINDOW})),
    ("window_status", {**WINDOW, "include_cache_stats": True}, AdminRequest("GET", "/admin/windows/w")),
    ("window_delete", {**WINDOW, "force": True, "delete_blocks": True}, AdminRequest("DELETE", "/admin/windows/w")),
    ("window_thaw", {**WINDOW, "warm_cache": False},
     AdminRequest("POST", "/admin/windows/w/thaw", body={"warm": "none"})),
    ("session_list", {"state": "frozen"}, AdminRequest("GET", "/admin/sessions", {"state": "frozen"})),
    ("session_list", {"state_filter": "FROZEN"}, AdminRequest("GET", "/admin/sessions", {"state": "frozen"})),
    ("health_check", {"component": "vllm"}, AdminRequest("GET", "/admin/health", {"component": "engine"})),
    ("health_check", {"component": "kv_store"}, AdminRequest("GET", "/admin/health", {"component": "cache"})),
    ("auto_freeze_check", {**SESSION, "token_count": 5, "prompt_prefix": "x"},
     AdminRequest("POST", f"{PUT}/check", body=SESSION)),
    ("auto_freeze_config", {}, AdminRequest("GET", PUT)),
    ("auto_freeze_config", {"policy": {}}, AdminRequest("GET", PUT)),
    ("auto_freeze_config", {"reset": True}, AdminRequest("DELETE", PUT)),
    ("auto_freeze_config",
     {"policy": {"enabled": True, "token_threshold": 100_000, "idle_timeout_minutes": 30,
                 "naming_pattern": "auto-{session_id}-{timestamp}"}},
     AdminRequest("PUT", PUT, body={"enabled": True, "token_threshold": 100_000, "idle_timeout_minutes": 30,
                                    "naming_pattern": "auto-{session_id}-{timestamp}"})),
    ("auto_freeze_config",
     {"enabled": True, "token_threshold": 0.75, "token_count_threshold": 500, "cooldown_seconds": 60,
      "window_name_pattern": "a-{session_id}-{timestamp}", "include_prompt": True},
     AdminRequest("PUT", PUT, body={"enabled": True, "context_share": 0.75, "token_threshold": 500,
                                    "cooldown_seconds": 60, "naming_pattern": "a-{session_id}-{timestamp}"})),
    ("auto_freeze_config", {"tags": ["auto-freeze"]}, AdminRequest("PUT", PUT, body={"tags": ("auto-freeze", "auto")})),
    ("auto_freeze_config", {"token_count_threshold": 0}, AdminRequest("PUT", PUT, body={"token_threshold": None})),
    ("auto_freeze_config", {"policy": {"idle_timeout_minutes": None}, "keep": 2},
     AdminRequest("PUT", PUT, body={"idle_timeout_minutes": None, "keep": 2})),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "arguments", "request_"), OLD)
def test_the_words_of_the_replaced_system_become_ours(
    tool: str, arguments: dict[str, Any], request_: AdminRequest
) -> None:
    assert tool_named(tool).request(arguments) == request_


BOTH: list[tuple[str, dict[str, Any], str]] = [
    ("window_clone", {"source_window": "a", "target_window": "b", "new_window_name": "b"}, "new_window_name"),
    ("window_thaw", {**WINDOW, "warm": "gpu", "warm_cache": True}, "warm_cache"),
    ("session_list", {"state": "frozen", "state_filter": "frozen"}, "state_filter"),
    ("auto_freeze_config", {"naming_pattern": "{session_id}{timestamp}", "window_name_pattern": "x"},
     "window_name_pattern"),
    ("auto_freeze_config", {"policy": {"token_threshold": 9, "token_count_threshold": 9}}, "token_count_threshold"),
    ("auto_freeze_config", {"policy": {"context_share": 0.5, "token_threshold": 0.5}}, "token_threshold"),
    ("auto_freeze_config", {"policy": {"keep": 2}, "keep": 2}, "keep"),
    ("auto_freeze_config", {"policy": {"naming_pattern": "{session_id}{timestamp}"},
                            "window_name_pattern": "{session_id}{timestamp}"}, "naming_pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "arguments", "field"), BOTH)
def test_two_names_of_one_parameter_at_once_are_refused(tool: str, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(GatewayError, match="are one parameter, and both are given") as caught:
        tool_named(tool).request(arguments)
    assert (caught.value.code, caught.value.details) == ("invalid_request", {"field": field})


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("auto_freeze_config", {"polcy": {}}, "unknown_parameter", "'polcy'"),
    ("auto_freeze_config", {"tags": ["not a tag"]}, "invalid_request", "tags must be tags"),
    ("auto_freeze_config", {"tags": [f"t{n}" for n in range(20)]}, "invalid_request", "20 tags, 'auto' among them"),
    ("auto_freeze_config", {"policy": {"idle_timeout": 5}}, "unknown_parameter", "'idle_timeout'"),
    ("auto_freeze_config", {"policy": []}, "invalid_request", "policy must be an object"),
    ("auto_freeze_config", {"policy": {"enabled": None}}, "invalid_request", "enabled must be true or false"),
    ("auto_freeze_config", {"policy": {"keep": 0}}, "invalid_request", "keep must be"),
    ("auto_freeze_config", {"policy": {"token_threshold": True}}, "invalid_request", "token_threshold must be"),
    ("auto_freeze_config", {"token_threshold": 0}, "invalid_request", "token_threshold must be"),
    ("auto_freeze_config", {"token_threshold": 1.5}, "invalid_request", "token_threshold must be"),
    ("auto_freeze_config", {"include_prompt": False}, "invalid_request", "include_prompt must be true"),
    ("auto_freeze_config", {"window_name_pattern": "x"}, "invalid_request", "window_name_pattern must be"),
    ("auto_freeze_config", {"reset": True, "keep": 3}, "invalid_request", "reset leaves nothing to set"),
    ("auto_freeze_config", {"reset": True, "policy": {}}, "invalid_request", "reset leaves nothing to set"),
    ("window_describe", {**WINDOW, "ttl_seconds": -1}, "invalid_request", "ttl_seconds must be"),
    ("window_describe", {**WINDOW, "ttl_seconds": False}, "invalid_request", "ttl_seconds must be"),
    ("window_fanout", {**WINDOW, "count": 101}, "invalid_request", "count must be a whole number from 1 to 100"),
    ("window_fanout", WINDOW, "invalid_request", "count is missing"),
    ("window_tree", {"limit": 0}, "invalid_request", "limit must be"),
    ("window_ask", {**WINDOW, "question": " \n"}, "invalid_request", "question must be a non-blank string"),
    ("window_ask", {**WINDOW, "question": "x" * 10_001}, "invalid_request", "question must be a string of at most"),
    ("window_ask", {**WINDOW, "question": "?", "max_tokens": 10**30}, "invalid_request", "max_tokens must be"),
    ("window_delete", {**WINDOW, "delete_blocks": False}, "invalid_request", "delete_blocks must be true, not false"),
    ("session_list", {"state_filter": "deleted"}, "invalid_request", "state_filter must be one of active"),
    ("session_delete", {"session_id": "a/b"}, "invalid_session_id", "session_id 'a/b'"),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "arguments", "code", "says"), REFUSED)
def test_what_no_tool_takes_is_refused_and_named(tool: str, arguments: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(GatewayError) as caught:
        tool_named(tool).request(arguments)
    assert (caught.value.code, says in caught.value.message) == (code, True), caught.value.message


SAMPLES: list[Any] = [
    None, True, 0, 1, -1, 0.5, 2, 100, 101, 10_080, 10_081, 604_800, 604_801, 10**9, 10**9 + 1, 1.5, "x",
    "{session_id}{timestamp}", "{session_id}{timestamp}" + "a" * 80, [], [{"use": "x"}], [{}] * 33, {},
]  # fmt: skip


@pytest.mark.parametrize("name", rules.READERS)
def test_the_schema_of_each_rule_takes_what_the_rule_takes(name: str) -> None:
    """But a share that is given as a threshold, and what only the pattern itself can tell."""
    schema = tool_named("auto_freeze_config").input_schema["properties"]["policy"]["properties"][name]
    for value in SAMPLES:
        if (name, value) == ("naming_pattern", "x") or (name == "token_threshold" and isinstance(value, float)):
            continue
        try:
            rules.READERS[name](name, value)
            taken = True
        except GatewayError:
            taken = False
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == taken, (name, value)
