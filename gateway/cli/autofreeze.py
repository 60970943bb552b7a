"""`cwg policy`: the rules of automatic freezing."""

import json
from collections.abc import Mapping
from typing import Any

import click

from gateway.cli.connection import call, completing, operation
from gateway.cli.output import Result, filled
from gateway.cli.units import share, span

_SWITCHES = ("enabled", "at_shutdown")  # rules that are on or off, and have no value
_IN_SECONDS = ("cooldown_seconds", "ttl_seconds")


@operation
@click.option(
    "--set",
    "assignments",
    metavar="RULE=VALUE",
    multiple=True,
    help="set a rule, such as idle_timeout_minutes=30; `off` turns it off; may be repeated",
)
@click.option("--reset", is_flag=True, help="drop rules set at run time and return to the settings")
@click.option(
    "--check",
    "session",
    metavar="SESSION",
    shell_complete=completing("session"),
    help="show what the rules decide for SESSION now",
)
def policy(assignments: tuple[str, ...], reset: bool, session: str | None) -> Result:
    """Show or set the rules of automatic freezing."""
    if sum((bool(assignments), reset, session is not None)) > 1:
        raise click.UsageError("--set, --reset and --check exclude each other")
    if session is not None:
        answer = call("POST", "/admin/policies/check", body={"session_id": session})
        return Result(answer, _decision(answer))
    if assignments:
        answer = call("PUT", "/admin/policies", body=dict(map(_rule, assignments)), nulls=True)
    else:
        answer = call("DELETE" if reset else "GET", "/admin/policies")
    return Result(answer, _rules(answer))


def _rules(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The rules, under the names and with the values that `--set` takes."""
    told = ("warnings", "set_at_run_time", "available")
    rules = {name: _shown(name, value) for name, value in answer.items() if name not in told}
    return rules | {
        "set at run time": answer["set_at_run_time"] or "none: all are from the settings",
        "policies may use": answer["available"],
    }


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == []:
        return "off"
    if isinstance(value, int | float):
        return f"{value:.10g}" + (f" ({span(value)})" if name in _IN_SECONDS else "")
    return value if isinstance(value, str) else json.dumps(value)


def _decision(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the rules decide for a session, then what each of those that are on says."""
    reason, held_back = answer["reason"], answer["held_back"]
    lines = {
        "session": answer["session_id"],
        "would freeze": answer["triggered"],
        "because": reason,
        "held back": held_back,
        "into": answer["window_name"],
        "context": share(answer["token_count"], answer["context_limit"], "token"),
        "idle": span(answer["idle_seconds"]),
    }
    opinions = {one["policy"]: one["error"] or one["reason"] or "not yet" for one in answer["policies"]}
    return filled(lines) | opinions


def _rule(assignment: str) -> tuple[str, Any]:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise click.BadParameter(f"{assignment!r} is not RULE=VALUE", param_hint="--set")
    return name, _value(name, value)


def _value(name: str, text: str) -> Any:
    """The value as `policy` shows it, or as JSON, else as a string: a word needs no quotes."""
    if name in _SWITCHES and text in ("on", "off"):
        return text == "on"
    if text == "off":
        return [] if name == "policies" else None
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMANDS = (policy,)
