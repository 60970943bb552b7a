"""`cwg session`: what is done to one session."""

import sys

import click

from gateway.cli import receipts
from gateway.cli.connection import call, completing, operation, session_path
from gateway.cli.output import Result, say_messages


@operation
@click.argument("session", shell_complete=completing("session"))
@click.option("--yes", "-y", is_flag=True, help="do not ask for confirmation")
def delete(session: str, yes: bool) -> Result:
    """Delete SESSION, and KV that only it needs.

    Its windows stay. On a terminal, this asks for confirmation.
    """
    if not yes and sys.stdin.isatty():
        click.confirm(f"Delete session {session!r} with its text, and the KV that only it needs?", abort=True, err=True)
    answer = call("DELETE", session_path(session))
    return Result(answer, {"session": answer["session_id"], **receipts.deleted(answer)})


@operation
@click.argument("session", shell_complete=completing("session"))
def messages(session: str) -> Result:
    """Print the transcript of SESSION."""
    answer = call("GET", session_path(session, "messages"))
    return Result(answer, then=lambda: say_messages(answer))


COMMANDS = (click.Group("session", commands=[delete, messages], help="Delete a session, or print its transcript."),)
