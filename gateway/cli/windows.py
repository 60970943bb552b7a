"""Commands that create windows or use them."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import click

from gateway.cli import receipts
from gateway.cli.connection import Word, base_url, call, completing, operation, watched, window, window_path
from gateway.cli.output import Result, filled, line, say, say_messages, table
from gateway.cli.units import at, counted, took

_LONGEST_STEM = 112  # of a window's name of 128 characters, so that the time has room

_description = click.option("--description", help="description of the window")
_tags = click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
_at_turn = click.option(
    "--at-turn", type=int, help="turn of the window to begin at, from 1; `cwg messages NAME` shows them"
)
_max_tokens = click.option("--max-tokens", type=int, help="maximum length of the answer, in tokens")


@operation
@click.argument("session", shell_complete=completing("session"))
@click.argument("name", required=False)
@_description
@_tags
@click.option("--ttl", "ttl_seconds", type=float, help="seconds until the window expires; default: never")
def freeze(session: str, name: str | None, tags: tuple[str, ...], **options: Any) -> Result:
    """Freeze SESSION into the window NAME.

    Without NAME, the window is named after the session and the time.
    """
    body = {"session_id": session, "window_name": name or _name_for(session), "tags": list(tags) or None, **options}
    answer = watched("/admin/windows", body)
    return Result(answer, receipts.stored(answer))


def _name_for(session: str) -> str:
    """A name for a window of a session: of its id, but the colon, and the time."""
    return f"{session.replace(':', '-')[:_LONGEST_STEM]}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


@operation
@window
@click.option("--session", "new_session_id", help="id of the new session")
@click.option(
    "--into",
    "into_session",
    help="an existing session, to be taken back to the window; a new one if not given",
    shell_complete=completing("session"),
)
@click.option("--keep-as", help="first freeze what that session has into the window of this name")
@_at_turn
@click.option(
    "--warm",
    type=Word(["none", "cpu", "gpu"]),
    default="gpu",
    show_default=True,
    help="where to load the KV: nowhere yet, LMCache's memory, or the engine",
)
@click.option("--continue", "continuation_prompt", help="prompt to send immediately as the new session's next turn")
@click.option("--as-text", is_flag=True, help="only the text, for a model with other weights or one no longer served")
@_max_tokens
def thaw(name: str, **options: Any) -> Result:
    """Thaw the window NAME into a session, new by default."""
    if options["into_session"] is not None and options["new_session_id"] is not None:
        raise click.UsageError("--session makes a new session, --into takes an existing one: give one of them")
    if options["keep_as"] is not None and options["into_session"] is None:
        raise click.UsageError("--keep-as keeps what the session of --into has: give that too")
    answer = watched(window_path(name, "thaw"), options)
    session = answer["session_id"]
    lines = {
        "session": session,
        **receipts.replaced(answer["replaced"]),
        "model": answer["model"],
        **receipts.thawed(answer["receipt"]),
        "continue at": base_url(session),
    }
    continuation = answer["continuation"]
    if continuation is None:
        return Result(answer, lines)
    if continuation["error"] is not None:
        problem = f"thawed, but the continuation failed: {continuation['error'].get('message')}"
        return Result(answer, lines, error=problem)
    return Result(answer, lines, then=lambda: say(continuation["message"]["content"] or ""))


@operation
@click.argument("source", shell_complete=completing("window"))
@click.argument("target")
@_description
@_tags
@click.option("--isolate", is_flag=True, help="use a salt of its own: neither finds the other's KV")
@_at_turn
def clone(source: str, target: str, tags: tuple[str, ...], isolate: bool, **options: Any) -> Result:
    """Clone the window SOURCE as TARGET; no KV is copied."""
    body = {"target_window": target, "tags": list(tags) or None, "isolate": isolate or None, **options}
    answer = call("POST", window_path(source, "clone"), body=body)
    lines = {
        "window": answer["target_window"],
        "cloned from": answer["source_window"],
        "tokens": f"{answer['token_count']:,}",
        "kv": answer["kv"],
        "shared": counted(answer["shared_blocks"], "object"),
        "salt": "of its own" if answer["isolated"] else "",
    }
    return Result(answer, filled(lines))


@operation
@window
@click.option("--description", help="new description; empty clears it")
@click.option("--tag", "tags", multiple=True, help="new tags; may be given more than once")
@click.option("--no-tags", is_flag=True, help="remove all tags")
@click.option("--ttl", "ttl_seconds", type=float, help="seconds from now until the window expires")
@click.option("--no-ttl", is_flag=True, help="never expire")
def describe(
    name: str, description: str | None, tags: tuple[str, ...], no_tags: bool, ttl_seconds: float | None, no_ttl: bool
) -> Result:
    """Change description, tags or expiry of the window NAME."""
    if (tags and no_tags) or (ttl_seconds is not None and no_ttl):
        raise click.UsageError("--tag and --no-tags, --ttl and --no-ttl exclude each other")
    options = {"description": description, "tags": list(tags) or None, "ttl_seconds": ttl_seconds}
    cleared = {"tags": no_tags, "ttl_seconds": no_ttl}
    body = {field: value for field, value in options.items() if value is not None or cleared.get(field)}
    answer = call("PATCH", window_path(name), body=body, nulls=True)
    expiry = at(answer["expires_at"], time.time()) or "never"
    lines = {"window": answer["name"], **{field: answer[field] for field in ("description", "tags")}, "expires": expiry}
    return Result(answer, lines)


@operation
@click.argument("name", shell_complete=completing("window"))
@click.argument("question", required=False)
@click.option("--any", "ask_any", is_flag=True, help="no NAME: ask the windows that match the question best")
@click.option("--search", help="with --any: find the windows by this text, not by the question")
@click.option("--windows", "max_windows", type=int, help="with --any: how many windows to ask; default 3")
@click.option("--timeout", "timeout_seconds", type=int, help="with --any: seconds to wait for all answers; default 120")
@_max_tokens
@_at_turn
def ask(
    name: str, question: str | None, ask_any: bool, max_tokens: int | None, at_turn: int | None, **options: Any
) -> Result:
    """Ask the window NAME a QUESTION; nothing is changed or kept.

    With --any, `cwg ask --any QUESTION` asks the windows that match the question best.
    """
    if ask_any:
        if question is not None:
            raise click.UsageError("--any takes only a question: leave NAME out, and put the question in quotes")
        if at_turn is not None:
            raise click.UsageError("--at-turn is a turn of one window: name it instead of --any")
        return _ask_any({"question": name, "max_tokens": max_tokens, **options})
    if question is None or any(value is not None for value in options.values()):
        raise click.UsageError("give NAME and QUESTION, or --any and a question, which has its options")
    answer = watched(window_path(name, "ask"), {"question": question, "max_tokens": max_tokens, "at_turn": at_turn})
    return Result(answer, then=lambda: _say_answer(answer))


def _ask_any(body: Mapping[str, Any]) -> Result:
    answer = watched("/admin/ask", body)

    def show() -> None:
        for one in answer["answers"]:
            say(f"{line(one['window_name'])}: {line(one['title'] or '')}".rstrip(": "))
            if one["error"]:
                say(f"error: {one['error']['message']}", err=True)
            else:
                _say_answer(one)
            say("")

    return Result(answer, then=show, ok=any(one["error"] is None for one in answer["answers"]))


def _say_answer(answer: Mapping[str, Any]) -> None:
    receipt = answer["receipt"]
    cached = "?" if receipt["cached_tokens"] is None else receipt["cached_tokens"]
    say(answer["answer"])
    say(
        f"{receipt['prompt_tokens']} tokens, {cached} from the cache; {receipt['completion_tokens']} of answer "
        f"({answer['finish_reason']}); {took(receipt['duration_ms'])}",
        err=True,
    )
    if receipt["saved"]:
        say(receipts.saved(receipt["saved"], receipt["duration_ms"]), err=True)


@operation
@window
@click.argument("count", type=int)
@click.option("--prefix", help="names of the new sessions: PREFIX-1, PREFIX-2 and so on")
@_at_turn
def fanout(name: str, **body: Any) -> Result:
    """Thaw the window NAME into COUNT sessions; no KV is copied."""
    answer = call("POST", window_path(name, "fanout"), body=body)
    rows = [{"session": session, "continue at": base_url(session)} for session in answer["sessions"]]
    return Result(answer, then=lambda: table(rows))


@operation
@window
def prefetch(name: str) -> Result:
    """Load the KV of the window NAME into the cache's memory."""
    answer = watched(window_path(name, "prefetch"), {})
    return Result(answer, receipts.loaded(answer))


@operation
@window
def evict(name: str) -> Result:
    """Move the KV of the window NAME from memory to disk and Redis."""
    answer = watched(window_path(name, "evict"), {})
    return Result(answer, receipts.evicted(answer))


@operation
@window
@click.option("--deep", is_flag=True, help="also generate from the KV and compare; computes the window once")
def verify(name: str, deep: bool) -> Result:
    """Check all KV of the window NAME; exit code 1 if damaged."""
    answer = watched(window_path(name, "verify"), {"deep": deep})
    damaged = [
        f"chunk {d['chunk']} {d['hash']}: {d['state']} in {d['tier'] or 'every tier'}" for d in answer["damaged"]
    ]

    def show_damaged() -> None:
        for chunk in damaged:
            say(chunk, err=True)

    return Result(answer, receipts.verified(answer), then=show_damaged, ok=answer["ok"])


@operation
@window
def delete(name: str) -> Result:
    """Delete the window NAME, and KV that nothing else holds."""
    answer = call("DELETE", window_path(name))
    lines = {"window": answer["window_name"], **receipts.deleted(answer)}
    if kept := answer["blocks_kept"]:
        lines["kept"] = f"{counted(kept, 'object')} that another window or a session needs"
        lines["to free"] = "`cwg session delete SESSION` deletes what only that session needs"
    return Result(answer, lines)


@operation
@window
def messages(name: str) -> Result:
    """Print the transcript of the window NAME."""
    answer = call("GET", window_path(name, "messages"))
    return Result(answer, then=lambda: say_messages(answer))


COMMANDS = (freeze, thaw, clone, describe, ask, fanout, prefetch, evict, verify, delete, messages)
