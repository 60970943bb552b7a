"""Commands that create windows or use them."""

from collections.abc import Mapping
from typing import Any

import click

from gateway.cli.connection import Word, call, completing, operation, watched, window, window_path
from gateway.cli.output import Result, flat, say

_description = click.option("--description", help="description of the window")
_tags = click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
_max_tokens = click.option("--max-tokens", type=int, help="maximum length of the answer, in tokens")


@operation
@click.argument("session", shell_complete=completing("session"))
@click.argument("name")
@_description
@_tags
@click.option("--ttl", "ttl_seconds", type=float, help="seconds until the window expires")
def freeze(session: str, name: str, tags: tuple[str, ...], **options: Any) -> Result:
    """Freeze SESSION into the window NAME."""
    body = {"session_id": session, "window_name": name, "tags": list(tags) or None, **options}
    answer = watched("/admin/windows", body)
    return Result(answer, {"window": answer["name"], "kv": answer["kv"], **flat(answer["receipt"])})


@operation
@window
@click.option("--session", "new_session_id", help="id of the new session")
@click.option(
    "--warm",
    type=Word(["none", "cpu", "gpu"]),
    default="gpu",
    show_default=True,
    help="where to load the KV: nowhere yet, LMCache's memory, or the engine",
)
@click.option("--continue", "continuation_prompt", help="prompt to send immediately as the new session's next turn")
@_max_tokens
def thaw(name: str, **options: Any) -> Result:
    """Thaw the window NAME into a new session."""
    answer = watched(window_path(name, "thaw"), options)
    lines = {"session": answer["session_id"], "model": answer["model"], **flat(answer["receipt"])}
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
def clone(source: str, target: str, description: str | None, tags: tuple[str, ...], isolate: bool) -> Result:
    """Clone the window SOURCE as TARGET; no KV is copied."""
    body = {"target_window": target, "description": description, "tags": list(tags) or None, "isolate": isolate or None}
    answer = call("POST", window_path(source, "clone"), body=body)
    return _fields(answer, "source_window", "target_window", "shared_blocks", "isolated", "kv")


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
    return _fields(answer, "name", "description", "tags", "expires_at")


@operation
@window
@click.argument("question")
@_max_tokens
def ask(name: str, question: str, max_tokens: int | None) -> Result:
    """Ask the window NAME a QUESTION; nothing is changed or kept."""
    answer = watched(window_path(name, "ask"), {"question": question, "max_tokens": max_tokens})
    receipt = answer["receipt"]
    cached = "?" if receipt["cached_tokens"] is None else receipt["cached_tokens"]

    def show() -> None:
        say(answer["answer"])
        say(
            f"{receipt['prompt_tokens']} tokens, {cached} from the cache; {receipt['completion_tokens']} of answer "
            f"({answer['finish_reason']}); {receipt['duration_ms']:.0f} ms",
            err=True,
        )

    return Result(answer, then=show)


@operation
@window
@click.argument("count", type=int)
@click.option("--prefix", help="names of the new sessions: PREFIX-1, PREFIX-2 and so on")
def fanout(name: str, **body: Any) -> Result:
    """Thaw the window NAME into COUNT sessions; no KV is copied."""
    answer = call("POST", window_path(name, "fanout"), body=body)
    sessions = answer["sessions"]
    return Result(answer, then=lambda: say("\n".join(sessions)))


@operation
@window
def prefetch(name: str) -> Result:
    """Load the KV of the window NAME into the cache's memory."""
    answer = watched(window_path(name, "prefetch"), {})
    return Result(answer, {"window": answer["window_name"], **flat(answer["receipt"])})


@operation
@window
def evict(name: str) -> Result:
    """Move the KV of the window NAME from memory to disk and Redis."""
    answer = watched(window_path(name, "evict"), {})
    tiers = {tier: f"{at['before']} before, {at['after']} now" for tier, at in answer["tiers"].items()}
    lines = {"window": answer["window_name"], "objects": answer["objects"], "kept": answer["kept"], **tiers}
    return Result(answer, lines)


@operation
@window
@click.option("--deep", is_flag=True, help="also generate from the KV and compare; computes the window once")
def verify(name: str, deep: bool) -> Result:
    """Check all KV of the window NAME; exit code 1 if damaged."""
    answer = watched(window_path(name, "verify"), {"deep": deep})
    tiers = {
        tier: f"{t['intact']} of {t['objects']} intact, {t['damaged']} damaged, {t['missing']} missing"
        if t["checked"]
        else "could not be checked"
        for tier, t in answer["tiers"].items()
    }
    totals = {k: answer[k] for k in ("ok", "kv", "chunks_expected", "chunks_pinned", "chunks_usable")}
    replays = {f"{replay['tier']}, used": _replay(replay) for replay in answer["deep"] or ()}
    damaged = [
        f"chunk {d['chunk']} {d['hash']}: {d['state']} in {d['tier'] or 'every tier'}" for d in answer["damaged"]
    ]

    def show_damaged() -> None:
        for chunk in damaged:
            say(chunk, err=True)

    lines = {"window": answer["window_name"], **totals, **tiers, **replays}
    return Result(answer, lines, then=show_damaged, ok=answer["ok"])


def _replay(replay: Mapping[str, Any]) -> str:
    used = f"{replay['cached_tokens']} of {replay['expected_cached_tokens']} tokens loaded"
    if replay["equal"]:
        return f"{replay['tokens_compared']} tokens equal, {used}"
    first = replay["first_difference"]
    return f"differs from token {first['position']} on, {used}" if first else f"not all was used: {used}"


@operation
@window
def delete(name: str) -> Result:
    """Delete the window NAME, and KV that nothing else holds."""
    answer = call("DELETE", window_path(name))
    return _fields(answer, *(field for field in answer if field != "warnings"))


@operation
@window
@click.option("--blocks", is_flag=True, help="list every KV object")
def status(name: str, blocks: bool) -> Result:
    """Show the window NAME and where its KV is."""
    query = {"include_lineage": "true", "include_blocks": "true" if blocks else None}
    answer = call("GET", window_path(name), query=query)
    fields = ("name", "session_id", "model", "token_count", "kv", "description", "tags", "created_at", "expires_at")
    cache = answer["kv_cache"]
    tiers = {
        tier: f"{t['pinned']} pinned ({t['pinned_bytes']} bytes), {t['present']} present"
        for tier, t in cache["tiers"].items()
    }
    more = {"parent": answer["lineage"]["parent"], "chunks": cache["block_count"], **tiers}
    return Result(answer, {field: answer[field] for field in fields} | more)


@operation
@window
def messages(name: str) -> Result:
    """Print the transcript of the window NAME."""
    answer = call("GET", window_path(name, "messages"))

    def show() -> None:
        for message in answer["messages"]:
            say(f"{message.get('role', '?')}: {message.get('content')}")

    return Result(answer, then=show)


def _fields(answer: Mapping[str, Any], *names: str) -> Result:
    return Result(answer, {name: answer[name] for name in names})


COMMANDS = (freeze, thaw, clone, describe, ask, fanout, prefetch, evict, verify, delete, status, messages)
