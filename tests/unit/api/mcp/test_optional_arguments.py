"""Optional parameters of every tool: what is blank or null counts as absent, and a wrong type is named."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from gateway.api.mcp.tool import Tool
from gateway.api.mcp.tools import TOOLS, tool_named
from gateway.api.requests import names_of
from gateway.errors import GatewayError

_NEEDED: dict[str, Any] = {
    "session_id": "s", "window_name": "w", "source_window": "w", "target_window": "c", "question": "?", "count": 2,
    "query": "x",
}  # fmt: skip
_VALUES: list[Any] = [{"a": 1}, [{"a": 1}], True, 7, 0.5, "x"]


def optional(tool: Tool) -> Iterator[str]:
    """Every name of an optional parameter, old and hidden ones among them."""
    for alias, name in names_of(tool.arguments).items():
        if not tool.arguments.model_fields[name].is_required():
            yield alias


def needed(tool: Tool, besides: str) -> dict[str, Any]:
    """The arguments of a call that is good without the parameter `besides`."""
    if tool.name == "window_status":
        return {"window_name": "w"} if besides != "window_name" else {"session_id": "s"}
    return {name: _NEEDED[name] for name in tool.input_schema["required"]}


def schema_of(tool: Tool, name: str) -> dict[str, Any]:
    """What a model reads about a parameter; about hidden ones nothing."""
    properties = tool.input_schema["properties"]
    found: dict[str, Any] = {**properties.get("policy", {}).get("properties", {}), **properties}.get(name, {})
    return found


EVERY = [(tool.name, name) for tool in TOOLS for name in optional(tool)]


def test_there_are_some() -> None:
    assert len(EVERY) > 60
    assert {("window_freeze", "prompt_prefix"), ("window_status", "session_id"), ("window_thaw", "max_tokens")} < {
        *EVERY
    }


@pytest.mark.parametrize("blank", ["", " \n", None])
@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_blank_or_null_optional_parameter_counts_as_absent(name: str, parameter: str, blank: str | None) -> None:
    tool = tool_named(name)
    given = needed(tool, parameter)
    if blank == "" and parameter in tool.cleared:
        body = tool.request({**given, parameter: blank}).body
        assert body is not None
        assert body[parameter] == ""
    else:
        assert tool.request({**given, parameter: blank}) == tool.request(given)


def test_blank_rules_inside_of_policy_count_as_absent_too() -> None:
    tool = tool_named("auto_freeze_config")
    assert tool.request({"policy": {"naming_pattern": "", "keep": 2}}).body == {"keep": 2}


@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_wrong_type_of_an_optional_parameter_is_named(name: str, parameter: str) -> None:
    tool = tool_named(name)
    kind = schema_of(tool, parameter).get("type")
    wrong = [value for value in _VALUES if kind and not _fits(value, kind)] or [{"a": 1}]
    for value in wrong:
        with pytest.raises(GatewayError) as caught:
            tool.request({**needed(tool, parameter), parameter: value})
        assert caught.value.code in {"invalid_request", "invalid_session_id", "invalid_window_name"}
        assert caught.value.message.startswith(parameter), caught.value.message


def _fits(value: Any, kind: str | list[str]) -> bool:
    return jsonschema.Draft202012Validator({"type": kind}).is_valid(value)


@pytest.mark.parametrize("parameter", ["window_name", "session_id"])
def test_a_blank_parameter_that_is_needed_is_refused(parameter: str) -> None:
    with pytest.raises(GatewayError) as caught:
        tool_named("window_freeze").request({"session_id": "s", "window_name": "w", parameter: ""})
    assert caught.value.code in {"invalid_session_id", "invalid_window_name"}


def test_a_list_without_tags_filters_nothing() -> None:
    assert tool_named("window_list").request({"tags": []}).query == {}
