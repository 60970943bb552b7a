"""The MCP tools for automatic windows. Rules are validated as PUT /admin/policies does, under any of their names."""

from collections.abc import Mapping
from typing import Any

from gateway.api import parameters
from gateway.api.admin import models
from gateway.api.mcp import answers
from gateway.api.mcp import parameters as params
from gateway.api.mcp.parameters import AdminRequest, Json, Param
from gateway.api.mcp.tool import About, Tool
from gateway.errors import GatewayError
from gateway.windows.autofreeze import rules
from policies.idle_timeout import MOST_MINUTES
from policies.token_threshold import MOST_TOKENS

_PATH = "/admin/policies"
_FLAG: Json = {"type": "boolean"}
_OBJECTS: Json = {"type": "array", "maxItems": rules.MOST_POLICIES, "items": {"type": "object"}}


def _number(about: str, *, most: float, kind: str = "number", least: int | None = None, off: bool = False) -> Json:
    low = {"exclusiveMinimum": 0} if least is None else {"minimum": least}
    switch = "; null: off" if off else ""
    return {"type": [kind, "null"] if off else kind, **low, "maximum": most, "description": f"{about}{switch}"}


_SHOWN: Mapping[str, Json] = {
    "enabled": {**_FLAG, "description": "whether anything is frozen automatically"},
    "idle_timeout_minutes": _number("freeze what was idle for so long", most=MOST_MINUTES, off=True),
    "token_threshold": _number(
        "freeze at so many tokens; a number up to 1 is meant as context_share", most=MOST_TOKENS, off=True
    ),
    "context_share": _number("freeze at this share of the context limit", most=1, off=True),
    "at_shutdown": {**_FLAG, "description": "freeze every session when the gateway ends"},
    "policies": {**_OBJECTS, "description": 'further policies, such as {"use": "token_threshold", "tokens": 8000}'},
    "naming_pattern": {
        "type": "string",
        "maxLength": rules.LONGEST_PATTERN,
        "description": "names of the windows, with {session_id} and {timestamp} in it, and {turns} if you like",
    },
    "cooldown_seconds": _number("least time between two windows of a session", most=rules.MOST_COOLDOWN_S),
    "keep": _number("how many automatic windows of a session are kept", most=rules.MOST_KEPT, kind="integer", least=1),
    "ttl_seconds": _number("how long an automatic window is kept", most=rules.MOST_TTL_S, off=True),
}
_ALSO = {"naming_pattern": ("window_name_pattern",)}


def _count_threshold(name: str, value: Any) -> Any:
    """The replaced system's absolute threshold: 0 was off."""
    return None if type(value) is int and value == 0 else rules.READERS["token_threshold"](name, value)


def _threshold(name: str, value: Any) -> Any:
    """Tokens, or the replaced system's share of the context. See `_as_rules`."""
    return value if _is_share(value) else rules.READERS["token_threshold"](name, value)


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= 1


_RULES: Mapping[str, Param] = {
    name: Param(shown, rules.READERS[name], also=_ALSO.get(name, ())) for name, shown in _SHOWN.items()
} | {
    "token_threshold": Param(_SHOWN["token_threshold"], _threshold),
    "token_count_threshold": Param({}, _count_threshold, wire="token_threshold", shown=False),
    "include_prompt": Param({}, params.one_of(True)().check, wire="", shown=False),  # a window always has its text
}


def _as_rules(given: Json) -> Json:
    """What was given, under the names that the rules have."""
    named: Json = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        wire = _RULES[name].wire
        rule = name if wire is None else wire
        if name == "token_threshold" and _is_share(value):
            rule = "context_share"
        if rule in named:
            raise params.twice(said[rule], name)
        if rule:
            named[rule], said[rule] = value, name
    return named


def _policy(name: str, value: Any) -> Json:
    if not isinstance(value, dict):
        raise parameters.invalid(name, "an object", value)
    return params.checked(_RULES, value, nulls=True)


def _asks(given: Json) -> AdminRequest:
    """Read without an argument, set what is given, or go back to the settings."""
    given = dict(given)
    reset = given.pop("reset", False)
    nested = given.pop("policy", None)
    if both := given.keys() & (nested or {}).keys():
        raise params.twice(f"policy.{min(both)}", min(both))
    changes = _as_rules({**(nested or {}), **given})
    if reset and (changes or nested is not None):
        raise GatewayError("invalid_request", "reset leaves nothing to set", hint="call it twice, reset first")
    if reset:
        return AdminRequest("DELETE", _PATH)
    return AdminRequest("PUT", _PATH, body=changes) if changes else AdminRequest("GET", _PATH)


TOOLS = (
    Tool(
        "auto_freeze_config",
        (f"GET {_PATH}", f"PUT {_PATH}", f"DELETE {_PATH}"),
        About(
            "Read the rules by which sessions are frozen automatically, or change them; they last over restarts",
            "without an argument to see them, with `policy` to set what you name there and leave the rest",
            "next to nothing; they hold for every session, not for yours alone",
            "`policy`, the rules as they are now, and `warnings`",
        ),
        {
            "policy": Param({**params.schema_of(_RULES), "description": "the rules to change"}, _policy),
            "reset": params.flag("back to the settings that the gateway was started with"),
            **{name: Param(param.schema, param.check, also=param.also, shown=False) for name, param in _RULES.items()},
        },
        (answers.PolicyConfig,),
        shape=answers.policy,
        asks=_asks,
    ),
    Tool(
        "auto_freeze_check",
        (f"POST {_PATH}/check",),
        About(
            "Tell what the rules say of a session now. Nothing is frozen by it; the gateway itself does that",
            "to learn how near a session is to being frozen, or why it was not",
            "cheap",
            "`triggered` and the `reason`, `held_back` where something forbids it now, `token_count`, "
            "`threshold_percent` of the context limit, `idle_seconds`, and what each policy says",
        ),
        {
            "session_id": params.session(required=True),
            "token_count": Param({}, params.whole(0, MOST_TOKENS)().check, wire="", shown=False),
        },
        (models.PolicyCheck,),
        brief=("estimates",),
    ),
)
