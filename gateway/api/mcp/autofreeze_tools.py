"""The MCP tools for automatic freezing. Rules are validated as PUT /admin/policies does, under any of their names."""

from gateway.api.admin.models import freezing
from gateway.api.mcp import answers, arguments
from gateway.api.mcp.admin_request import AdminRequest, Json
from gateway.api.mcp.tool import About, Tool
from gateway.api.requests import given_twice
from gateway.errors import GatewayError

_PATH = "/admin/policies"


def _request_of(given: Json) -> AdminRequest:
    """Read the rules without an argument, set those that are given, or go back to the settings."""
    reset = given.pop("reset", False)
    nested = given.pop("policy", None)
    if both := given.keys() & (nested or {}).keys():
        raise given_twice(f"policy.{min(both)}", min(both))
    changes = _as_rules({**(nested or {}), **given})
    if reset and (changes or nested is not None):
        raise GatewayError("invalid_request", "reset leaves nothing to set", hint="call it twice, reset first")
    if reset:
        return AdminRequest("DELETE", _PATH)
    return AdminRequest("PUT", _PATH, body=changes) if changes else AdminRequest("GET", _PATH)


def _as_rules(given: Json) -> Json:
    """What was given, under the names of the rules. The replaced system had two thresholds, one of them a share."""
    rules = dict(given)
    if arguments.is_share(given.get("token_threshold")):
        _rename(rules, "token_threshold", "context_share")
    if "token_count_threshold" in rules:
        _rename(rules, "token_count_threshold", "token_threshold")
    return rules


def _rename(rules: Json, old: str, new: str) -> None:
    if new in rules:
        raise given_twice(new, old)
    rules[new] = rules.pop(old)


TOOLS = (
    Tool(
        "auto_freeze_config",
        (f"GET {_PATH}", f"PUT {_PATH}", f"DELETE {_PATH}"),
        About(
            "Read the rules by which sessions are frozen automatically, or change them; they persist over restarts",
            "without an argument to see them, with `policy` to set the rules in it and leave the others",
            "next to nothing; they apply to every session, not only to yours",
            "`policy`, the rules as they are now, and `warnings`",
        ),
        arguments.AutoFreezeConfig,
        (answers.PolicyConfig,),
        shape=answers.policy,
        request_of=_request_of,
    ),
    Tool(
        "auto_freeze_check",
        (f"POST {_PATH}/check",),
        About(
            "Evaluate the rules for a session now. Nothing is frozen by it; the gateway itself does that",
            "to learn how near a session is to being frozen, or why it was not",
            "cheap",
            "`triggered` and the `reason`, `held_back` where something forbids it now, `token_count`, "
            "`threshold_percent` of the context limit, `idle_seconds`, and the result of each policy",
        ),
        arguments.AutoFreezeCheck,
        (freezing.PolicyCheck,),
        brief=("estimates",),
    ),
)
