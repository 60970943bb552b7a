"""`cwg policy`: the rules of automatic freezing."""

import json
from typing import Any

import click

from gateway.cli.connection import call, completing, operation
from gateway.cli.output import Result


@operation
@click.option(
    "--set", "assignments", metavar="RULE=VALUE", multiple=True, help="set a rule; null turns it off; may be repeated"
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
        opinions = {one["policy"]: one["error"] or one["reason"] or "does not freeze" for one in answer["policies"]}
        names = ("triggered", "reason", "held_back", "window_name", "token_count", "context_limit", "idle_seconds")
        return Result(answer, {name: answer[name] for name in names} | opinions)
    if assignments:
        answer = call("PUT", "/admin/policies", body=dict(map(_rule, assignments)), nulls=True)
    else:
        answer = call("DELETE" if reset else "GET", "/admin/policies")
    return Result(answer, {name: value for name, value in answer.items() if name != "warnings"})


def _rule(assignment: str) -> tuple[str, Any]:
    name, equals, value = assignment.partition("=")
    if not equals:
        raise click.BadParameter(f"{assignment!r} is not RULE=VALUE", param_hint="--set")
    return name, _value(value)


def _value(text: str) -> Any:
    """The text as JSON if it is JSON, else as a string: a word needs no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMANDS = (policy,)
