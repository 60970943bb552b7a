"""`cwg policy`: the rules of automatic freezing."""

import json
from collections.abc import Mapping
from typing import Any

import click

from gateway.cli import connection
from gateway.cli.connection import completing, verb
from gateway.cli.output import show


@verb
@click.option(
    "--set", "given", metavar="RULE=VALUE", multiple=True, help="set a rule; null turns it off; may be repeated"
)
@click.option("--reset", is_flag=True, help="drop rules set at run time and return to the settings")
@click.option(
    "--check",
    "session",
    metavar="SESSION",
    shell_complete=completing("session"),
    help="show what the rules decide for SESSION now",
)
def policy(given: tuple[str, ...], reset: bool, session: str | None, as_json: bool) -> None:
    """Show or set the rules of automatic freezing."""
    if sum((bool(given), reset, session is not None)) > 1:
        raise click.UsageError("--set, --reset and --check exclude each other")
    if session is not None:
        answer = connection.call("POST", "/admin/policies/check", body={"session_id": session})
        opinions = {one["policy"]: one["error"] or one["reason"] or "no" for one in answer["policies"]}
        names = ("triggered", "reason", "held_back", "window_name", "token_count", "context_limit", "idle_seconds")
        show(answer, as_json, {**{name: answer[name] for name in names}, **opinions})
        return
    show(answer := _changed(_rules(given), reset), as_json, {k: v for k, v in answer.items() if k != "warnings"})


def _changed(rules: Mapping[str, Any], reset: bool) -> dict[str, Any]:
    if reset:
        return connection.call("DELETE", "/admin/policies")
    if rules:
        return connection.call("PUT", "/admin/policies", body=rules, nulls=True)
    return connection.call("GET", "/admin/policies")


def _rules(given: tuple[str, ...]) -> dict[str, Any]:
    rules = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise click.BadParameter(f"{one!r} is not RULE=VALUE", param_hint="--set")
        rules[name] = _value(value)
    return rules


def _value(text: str) -> Any:
    """As JSON where it is that, or else as it is: a word needs no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMANDS = (policy,)
