"""`cwg status`: one window, or one session."""

import time
from collections.abc import Mapping
from typing import Any, Literal

import click

from gateway.cli.admin_client import AdminError
from gateway.cli.connection import admin, base_url, completing, failures, operation, session_path, window_path
from gateway.cli.output import Result, Row, filled, say, table
from gateway.cli.receipts import pinned_tiers, saved
from gateway.cli.units import ago, at, counted, share, size, took

Kind = Literal["window", "session"]
Answer = Mapping[str, Any]
# The answers for a name that may still be a session's: an id may have a colon, and a window's name may not.
_NO_WINDOW = ("window_not_found", "invalid_window_name")


@operation
@click.argument("name", shell_complete=completing("window", "session"))
@click.option("--blocks", is_flag=True, help="also list every KV object of the window")
@click.option("--window", "kind", flag_value="window", help="the window of this name")
@click.option("--session", "kind", flag_value="session", help="the session of this name, even if there is a window")
def status(name: str, blocks: bool, kind: Kind | None) -> Result:
    """Show the window or session NAME, and where its KV is."""
    if blocks and kind == "session":
        raise click.UsageError("--blocks and --session exclude each other")
    with failures():
        if kind == "session":
            return _of_session(_get(session_path(name)))
        return _of_window_or_session(name, blocks=blocks, only_window=blocks or kind == "window")


def _of_window_or_session(name: str, *, blocks: bool, only_window: bool) -> Result:
    query = {"include_lineage": "true", "include_blocks": "true" if blocks else None}
    try:
        return _of_window(_get(window_path(name), query))
    except AdminError as error:
        if only_window or error.code not in _NO_WINDOW:
            raise
    try:
        return _of_session(_get(session_path(name)))
    except AdminError as error:
        if error.code != "session_not_found":
            raise
        hint = "`cwg list` and `cwg sessions` list what there is"
        message = f"there is no window and no session {name!r}"
        raise AdminError(message, hint, "nothing_of_that_name", details={"name": name}) from error


def _get(path: str, query: Answer | None = None) -> Answer:
    return admin().call("GET", path, query=query)


def _of_window(answer: Answer) -> Result:
    cache, lineage, now = answer["kv_cache"], answer["lineage"], time.time()
    stored = f", {counted(cache['block_count'], 'object')}, {size(cache['total_size_bytes'])}"
    lines = {
        "window": answer["name"],
        "title": answer["title"],
        "session": answer["session_id"],
        "model": answer["model"],
        "tokens": f"{answer['token_count']:,}",
        "kv": answer["kv"] + (stored if cache["block_count"] else ""),
        "saved": saved(answer["saved"]),
        "description": answer["description"],
        "tags": answer["tags"],
        "created": at(answer["created_at"], now),
        "expires": at(answer["expires_at"], now) or "never",
        "parent": lineage["parent"],
        "children": lineage["clones"],
    }

    def show() -> None:
        _section(pinned_tiers(cache))
        _section([_block(chunk, block) for chunk, block in enumerate(answer.get("blocks", ()))], varying=("rank",))

    return Result(answer, filled(lines), then=show)


def _block(number: int, block: Answer) -> Row:
    return {
        "object": block["hash"],
        "number": number,
        "rank": block["rank"],
        "size": size(block["size_bytes"]),
        "pinned in": list(block["pinned"]),
        "found in": block["present"],
    }


def _of_session(answer: Answer) -> Result:
    now = time.time()
    lines = {
        "session": answer["id"],
        "title": answer["title"],
        "state": answer["state"],
        "model": answer["model"],
        "context": share(answer["token_count"], answer["context_limit"], "token"),
        "saved": saved(answer["saved"]),
        "recognised by": answer["recognised_by"],
        "thawed from": answer["window"],
        "forked from": answer["forked_from"],
        "successor": answer["successor"],
        "frozen into": answer["windows"],
        "created": at(answer["created_at"], now),
        "last active": at(answer["last_active_at"], now),
        "frozen": at(answer["frozen_at"], now),
        "continue at": base_url(answer["id"]),
    }
    turns = [_turn(turn, now) for turn in answer["turns"]]

    def show() -> None:
        _section(turns, varying=("model",), note="miss")
        if len(turns) < answer["turn_count"]:
            say(f"the last {len(turns)} of {counted(answer['turn_count'], 'turn')}", err=True)

    return Result(answer, filled(lines), then=show)


def _turn(turn: Answer, now: float) -> Row:
    cached, expected = turn["cached_tokens"], turn["expected_cached_tokens"]
    known = cached is not None
    return {
        "turn": ago(turn["started_at"], now),
        "took": took(turn["duration_ms"]),
        "model": turn["model"],
        "prompt": f"{turn['prompt_tokens']:,}" if turn["prompt_tokens"] is not None else "",
        "cached": f"{cached:,}" if known else "",
        "expected": f"{expected:,}" if known and expected is not None else "",
        "reply": f"{turn['completion_tokens']:,}" if turn["completion_tokens"] is not None else "",
        "outcome": turn["outcome"],
        "miss": "; ".join(why for why in (turn["detail"], turn["miss"]) if why and why != "none"),
    }


def _section(rows: list[Row], **options: Any) -> None:
    if rows:
        say("")
        table(rows, **options)


COMMANDS = (status,)
