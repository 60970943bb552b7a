"""The admin door, second half: what one does with a window that is there already."""

from dataclasses import asdict
from typing import Any

from gateway.edge import fields, show
from gateway.edge.endpoint import Call, Verb
from gateway.records import check_session_id
from gateway.windows import ask, describe, fanout, prefetch, thaw, tree, verify


async def describe_window(call: Call) -> tuple[int, Any]:
    """PATCH /admin/windows/{name}."""
    said = await call.body(
        {
            "description": fields.or_null(fields.description),
            "tags": fields.or_null(fields.tags),
            "ttl_seconds": fields.or_null(fields.seconds),
        },
        nulls=True,
    )
    return 200, show.window(await describe.describe(call.parts, call.tenant, call.window_name, said))


async def verify_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/verify."""
    await call.body({})
    return 200, asdict(await verify.verify(call.parts, call.tenant, call.window_name, call.progress))


async def ask_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/ask."""
    body = await call.body(
        {"question": _question, "max_tokens": fields.count(1, ask.MAX_TOKENS)}, required=("question",)
    )
    said = await ask.ask(
        call.parts, call.tenant, call.window_name, body["question"], body.get("max_tokens"), call.progress
    )
    return 200, {
        "window_name": said.window.name,
        "model": said.window.model,
        "answer": said.text,
        "reasoning": said.reasoning,
        "finish_reason": said.finish_reason,
        "receipt": {
            "prompt_tokens": said.usage.prompt,
            "cached_tokens": said.usage.cached,
            "computed_tokens": said.computed_tokens,
            "completion_tokens": said.usage.completion,
            "chunks_expected": said.restored.chunks_expected,
            "chunks_found": said.restored.chunks_found,
            "partial": said.restored.partial,
            "duration_ms": said.duration_ms,
        },
        "warnings": said.restored.warnings,
    }


async def prefetch_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/prefetch."""
    await call.body({})
    receipt = await prefetch.prefetch(call.parts, call.tenant, call.window_name, call.progress)
    return 200, {"window_name": call.window_name, "receipt": _seen(receipt), "warnings": receipt.warnings}


async def fan_out_window(call: Call) -> tuple[int, Any]:
    """POST /admin/windows/{name}/fanout."""
    body = await call.body(
        {"count": fields.count(1, fanout.MOST), "prefix": lambda name, value: check_session_id(value, name)},
        required=("count",),
    )
    sessions, window, receipt = await fanout.fanout(
        call.parts, call.tenant, call.window_name, body["count"], body.get("prefix"), call.progress
    )
    return 201, {
        "window_name": window.name,
        "model": window.model,
        "token_count": window.token_count,
        "sessions": [session.id for session in sessions],
        "receipt": _seen(receipt),
        "warnings": receipt.warnings,
    }


async def show_tree(call: Call) -> tuple[int, Any]:
    """GET /admin/tree."""
    limit = call.query({"limit": fields.whole(1, tree.MOST)}).get("limit", 1000)
    seen = await tree.tree(call.parts, call.tenant, limit)
    return 200, {
        "nodes": [_node(node) for node in seen.nodes],
        "windows": seen.windows,
        "sessions": seen.sessions,
        "truncated": seen.truncated,
        "limit": limit,
    }


def _node(node: tree.Node) -> dict[str, Any]:
    kind, name = node.parent or (None, None)
    return {
        "kind": node.kind,
        "name": node.name,
        "state": node.state,
        "model": node.model,
        "token_count": node.token_count,
        "created_at": show.moment(node.created_at),
        "parent": {"kind": kind, "name": name} if node.parent else None,
        "relation": node.relation,
    }


def _seen(receipt: thaw.Receipt) -> dict[str, Any]:
    return {name: getattr(receipt, name) for name in _SEEN}


def _question(name: str, value: object) -> str:
    question = fields.text(name, value, longest=ask.MAX_QUESTION)
    if not question.strip():
        raise fields.invalid(name, "a question, not blank", value)
    return question


# Where no engine is asked: of a thaw's receipt, what was seen in the tiers.
_SEEN = (
    "chunks_expected",
    "chunks_found",
    "chunks_relinked",
    "chunks_corrupt",
    "chunks_prefetched",
    "partial",
    "duration_ms",
)

SERVED: list[tuple[str, str, Verb]] = [
    ("PATCH", "/admin/windows/{name}", describe_window),
    ("POST", "/admin/windows/{name}/verify", verify_window),
    ("POST", "/admin/windows/{name}/ask", ask_window),
    ("POST", "/admin/windows/{name}/prefetch", prefetch_window),
    ("POST", "/admin/windows/{name}/fanout", fan_out_window),
    ("GET", "/admin/tree", show_tree),
]
