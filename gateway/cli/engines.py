"""`cwg drain`: take an engine out of use."""

import time
from collections.abc import Mapping
from typing import Any

import click

from gateway.cli.connection import call, operation
from gateway.cli.output import Result, Row, filled, line, say, table
from gateway.cli.units import at, counted

_PATH = "/admin/engines/drain"
_AGAIN_S = 2.0

Answer = Mapping[str, Any]


@operation
@click.argument("engine")
@click.option("--undo", is_flag=True, help="let the engine have requests again")
@click.option("--no-wait", is_flag=True, help="do what can be done now, and say what is left")
def drain(engine: str, undo: bool, no_wait: bool) -> Result:
    """Move the sessions of ENGINE to the other engines.

    ENGINE is the URL of an engine, or its host and port. It gets no more requests, and what it computes is finished.
    The command waits until it may be stopped; Ctrl-C ends only the waiting. Exit code 1 if a session could not
    be frozen.
    """
    if undo and no_wait:
        raise click.UsageError("--undo and --no-wait exclude each other")
    if undo:
        answer = call("POST", _PATH, body={"engine": engine, "undo": True})
        return Result(answer, {"engine": answer["engine"], "draining": answer["draining"]})
    answer = call("POST", _PATH, body={"engine": engine})
    moved = list(answer["moved"])
    while not no_wait and not answer["empty"] and not _is_stuck(answer):
        say(f"waiting for {_waiting(answer)}", err=True)
        time.sleep(_AGAIN_S)
        answer = call("POST", _PATH, body={"engine": engine})
        moved += answer["moved"]
    return _result({**answer, "moved": moved})


def _is_stuck(answer: Answer) -> bool:
    """Whether nothing is left but sessions that cannot be frozen."""
    waiting = answer["waiting_for"]
    return bool(answer["failed"]) and waiting["sessions"] == len(answer["failed"]) and not waiting["requests"]


def _waiting(answer: Answer) -> str:
    waiting = answer["waiting_for"]
    parts = (
        counted(waiting["requests"], "request") if waiting["requests"] else "",
        counted(waiting["sessions"], "session") if waiting["sessions"] else "",
    )
    return " and ".join(filter(None, parts)) or f"{waiting['seconds']:g} s, until all workers and gateways know of it"


def _result(answer: Answer) -> Result:
    lines = {
        "engine": answer["engine"],
        "draining": f"since {at(answer['since'], time.time())}",
        "moved": counted(len(answer["moved"]), "session"),
        "empty": "yes: it may be stopped" if answer["empty"] else f"no: it waits for {_waiting(answer)}",
    }

    def show() -> None:
        if answer["moved"]:
            say("")
            table([_moved(one) for one in answer["moved"]])
        for one in answer["failed"]:
            say(f"not frozen: {line(one['session_id'])}: {line(one['reason'])}", err=True)

    return Result(answer, filled(lines), then=show, ok=not answer["failed"])


def _moved(one: Answer) -> Row:
    loaded = one["chunks_loaded"]
    return {
        "session": one["session_id"],
        "window": one["window_name"],
        "continues at": one["engine"],
        "loaded": "" if loaded is None else counted(loaded, "chunk"),
    }


COMMANDS = (drain,)
