"""Commands that create windows or use them."""

from collections.abc import Mapping
from typing import Any

import click

from gateway.cli import connection
from gateway.cli.connection import Word, completing, verb, window
from gateway.cli.output import flat, print_json, say, show, warn


@verb
@click.argument("session", shell_complete=completing("session"))
@click.argument("name")
@click.option("--description", help="what the window is")
@click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
@click.option("--ttl", "ttl_seconds", type=float, help="seconds until the window expires")
def freeze(
    session: str, name: str, description: str | None, tags: tuple[str, ...], ttl_seconds: float | None, as_json: bool
) -> None:
    """Freeze SESSION into the window NAME."""
    body = {
        "session_id": session,
        "window_name": name,
        "description": description,
        "tags": list(tags) or None,
        "ttl_seconds": ttl_seconds,
    }
    answer = connection.watched("/admin/windows", body)
    receipt = answer["receipt"]
    show(answer, as_json, {"window": answer["name"], "kv": answer["kv"], **flat(receipt)})


@verb
@window
@click.option("--session", "new_session_id", help="id of the new session")
@click.option(
    "--warm",
    type=Word(["none", "cpu", "gpu"]),
    default="gpu",
    show_default=True,
    help="where to load the KV: nowhere yet, LMCache's memory, or the engine",
)
@click.option("--continue", "prompt", help="prompt to send immediately as the new session's next turn")
@click.option("--max-tokens", type=int, help="maximum length of the answer to it, in tokens")
def thaw(
    name: str, new_session_id: str | None, warm: str, prompt: str | None, max_tokens: int | None, as_json: bool
) -> None:
    """Thaw the window NAME into a new session."""
    body = {
        "new_session_id": new_session_id,
        "warm": warm,
        "continuation_prompt": prompt,
        "max_tokens": max_tokens,
    }
    answer = connection.watched(f"/admin/windows/{connection.part(name)}/thaw", body)
    show(answer, as_json, {"session": answer["session_id"], "model": answer["model"], **flat(answer["receipt"])})
    said = answer["continuation"]
    if said is None:
        return
    if said["error"] is not None:
        say(f"error: thawed, but the continuation failed: {said['error'].get('message')}", err=True)
        raise SystemExit(1)
    if not as_json:
        say(said["message"]["content"] or "")


@verb
@click.argument("source", shell_complete=completing("window"))
@click.argument("target")
@click.option("--description", help="what the clone is for")
@click.option("--tag", "tags", multiple=True, help="a tag; may be given more than once")
@click.option("--isolate", is_flag=True, help="use a salt of its own: neither finds the other's KV")
def clone(
    source: str, target: str, description: str | None, tags: tuple[str, ...], isolate: bool, as_json: bool
) -> None:
    """Clone the window SOURCE as TARGET; no KV is copied."""
    body = {"target_window": target, "description": description, "tags": list(tags) or None, "isolate": isolate or None}
    answer = connection.call("POST", f"/admin/windows/{connection.part(source)}/clone", body=body)
    shown = ("source_window", "target_window", "shared_blocks", "isolated", "kv")
    show(answer, as_json, {k: answer[k] for k in shown})


@verb
@window
@click.option("--description", help="new description; empty clears it")
@click.option("--tag", "tags", multiple=True, help="new tags; may be given more than once")
@click.option("--no-tags", is_flag=True, help="remove all tags")
@click.option("--ttl", "ttl_seconds", type=float, help="seconds from now until the window expires")
@click.option("--no-ttl", is_flag=True, help="never expire")
def describe(
    name: str,
    description: str | None,
    tags: tuple[str, ...],
    no_tags: bool,
    ttl_seconds: float | None,
    no_ttl: bool,
    as_json: bool,
) -> None:
    """Change description, tags or expiry of the window NAME."""
    if (tags and no_tags) or (ttl_seconds is not None and no_ttl):
        raise click.UsageError("--tag and --no-tags, --ttl and --no-ttl exclude each other")
    given = {"description": description, "tags": list(tags) or None, "ttl_seconds": ttl_seconds}
    cleared = {"tags": no_tags, "ttl_seconds": no_ttl}
    body = {field: value for field, value in given.items() if value is not None or cleared.get(field)}
    answer = connection.call("PATCH", f"/admin/windows/{connection.part(name)}", body=body, nulls=True)
    show(answer, as_json, {k: answer[k] for k in ("name", "description", "tags", "expires_at")})


@verb
@window
@click.argument("question")
@click.option("--max-tokens", type=int, help="maximum length of the answer, in tokens")
def ask(name: str, question: str, max_tokens: int | None, as_json: bool) -> None:
    """Ask the window NAME a QUESTION; nothing is changed or kept."""
    answer = connection.watched(
        f"/admin/windows/{connection.part(name)}/ask", {"question": question, "max_tokens": max_tokens}
    )
    if as_json:
        print_json(answer)
        return
    say(answer["answer"])
    receipt = answer["receipt"]
    cached = "?" if receipt["cached_tokens"] is None else receipt["cached_tokens"]
    say(
        f"{receipt['prompt_tokens']} tokens, {cached} from the cache; {receipt['completion_tokens']} of answer "
        f"({answer['finish_reason']}); {receipt['duration_ms']:.0f} ms",
        err=True,
    )
    warn(answer)


@verb
@window
@click.argument("count", type=int)
@click.option("--prefix", help="names of the new sessions: PREFIX-1, PREFIX-2 and so on")
def fanout(name: str, count: int, prefix: str | None, as_json: bool) -> None:
    """Thaw the window NAME into COUNT sessions; no KV is copied."""
    body = {"count": count, "prefix": prefix}
    answer = connection.call("POST", f"/admin/windows/{connection.part(name)}/fanout", body=body)
    if as_json:
        print_json(answer)
        return
    for session in answer["sessions"]:
        say(session)
    warn(answer)


@verb
@window
def prefetch(name: str, as_json: bool) -> None:
    """Load the KV of the window NAME into the cache's memory."""
    answer = connection.watched(f"/admin/windows/{connection.part(name)}/prefetch", {})
    show(answer, as_json, {"window": answer["window_name"], **flat(answer["receipt"])})


@verb
@window
def evict(name: str, as_json: bool) -> None:
    """Move the KV of the window NAME from memory to disk and Redis."""
    answer = connection.watched(f"/admin/windows/{connection.part(name)}/evict", {})
    tiers = {tier: f"{at['before']} before, {at['after']} now" for tier, at in answer["tiers"].items()}
    shown = {k: answer[k] for k in ("objects", "kept")}
    show(answer, as_json, {"window": answer["window_name"], **shown, **tiers})


@verb
@window
@click.option("--deep", is_flag=True, help="also generate from the KV and compare; computes the window once")
def verify(name: str, deep: bool, as_json: bool) -> None:
    """Check all KV of the window NAME; exit code 1 if damaged."""
    answer = connection.watched(f"/admin/windows/{connection.part(name)}/verify", {"deep": deep})
    tiers = {
        tier: f"{t['intact']} of {t['objects']} intact, {t['damaged']} damaged, {t['missing']} missing"
        if t["checked"]
        else "could not be checked"
        for tier, t in answer["tiers"].items()
    }
    chunks = {k: answer[k] for k in ("chunks_expected", "chunks_pinned", "chunks_usable")}
    deeper = {f"{one['tier']}, used": _replayed(one) for one in answer["deep"] or ()}
    seen = {"window": answer["window_name"], "ok": answer["ok"], "kv": answer["kv"], **chunks, **tiers, **deeper}
    show(answer, as_json, seen)
    if not as_json:
        for one in answer["damaged"]:
            say(f"chunk {one['chunk']} {one['hash']}: {one['state']} in {one['tier'] or 'every tier'}", err=True)
    if not answer["ok"]:
        raise SystemExit(1)


def _replayed(one: Mapping[str, Any]) -> str:
    """What the engine made of the KV of one tier, in words."""
    used = f"{one['cached_tokens']} of {one['expected_cached_tokens']} tokens loaded"
    if one["equal"]:
        return f"{one['tokens_compared']} tokens equal, {used}"
    first = one["first_difference"]
    return f"differs from token {first['position']} on, {used}" if first else f"not all was used: {used}"


@verb
@window
def delete(name: str, as_json: bool) -> None:
    """Delete the window NAME, and KV that nothing else holds."""
    answer = connection.call("DELETE", f"/admin/windows/{connection.part(name)}")
    show(answer, as_json, {k: v for k, v in answer.items() if k != "warnings"})


@verb
@window
@click.option("--blocks", is_flag=True, help="list every KV object")
def status(name: str, blocks: bool, as_json: bool) -> None:
    """Show the window NAME and where its KV is."""
    query = {"include_lineage": "true", "include_blocks": "true" if blocks else None}
    answer = connection.call("GET", f"/admin/windows/{connection.part(name)}", query=query)
    cache = answer["kv_cache"]
    shown = {
        k: answer[k] for k in ("name", "session_id", "model", "token_count", "kv", "description", "tags", "created_at")
    }
    show(
        answer,
        as_json,
        shown | {"parent": answer["lineage"]["parent"], "chunks": cache["block_count"], **_tiers(cache)},
    )


def _tiers(cache: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{tier['pinned']} pinned ({tier['pinned_bytes']} bytes), {tier['present']} present"
        for name, tier in cache["tiers"].items()
    }


@verb
@window
def messages(name: str, as_json: bool) -> None:
    """Print the transcript of the window NAME."""
    answer = connection.call("GET", f"/admin/windows/{connection.part(name)}/messages")
    if as_json:
        print_json(answer)
        return
    for message in answer["messages"]:
        say(f"{message.get('role', '?')}: {message.get('content')}")


COMMANDS = (freeze, thaw, clone, describe, ask, fanout, prefetch, evict, verify, delete, status, messages)
