"""The admin API's operations on existing windows."""

import asyncio

from gateway.api.admin import serializers
from gateway.api.admin.models import lineage, requests, responses
from gateway.api.endpoint import Call
from gateway.api.operation import ENGINE, operation
from gateway.api.schemas import Json
from gateway.windows import ask, catalog, prefetch_evict, thaw, tree, verify


@operation("PATCH", "/admin/windows/{name}")
async def describe_window(call: Call, body: requests.DescribeRequest) -> responses.Window:
    """Change a window's description, tags or lifetime; null clears them."""
    window = await catalog.describe(call.context, call.window_name, body.given())
    return responses.Window(**serializers.window_fields(window, call.now))


@operation("POST", "/admin/windows/{name}/verify", errors=("cache_unavailable", *ENGINE))
async def verify_window(call: Call, body: requests.VerifyRequest) -> responses.Verified:
    """Check every byte of a window where it is pinned."""
    verdict = await verify.verify(call.context, call.window_name, deep=body.deep)
    return responses.Verified.model_validate(verdict)


@operation("POST", "/admin/windows/{name}/ask", errors=("window_corrupted", *ENGINE))
async def ask_window(call: Call, body: requests.AskRequest) -> responses.Answered:
    """Ask a window a question. The window does not change, and neither question nor answer is kept."""
    answer = await ask.ask(call.context, call.window_name, body.question, body.max_tokens, body.at_turn)
    return responses.Answered(
        window_name=answer.window.name,
        model=answer.window.model,
        answer=answer.text,
        reasoning=answer.reasoning,
        finish_reason=answer.finish_reason,
        receipt=serializers.ask_receipt(answer),
        warnings=list(answer.restored.warnings),
    )


@operation("POST", "/admin/windows/{name}/prefetch", errors=("cache_unavailable", *ENGINE))
async def prefetch_window(call: Call) -> responses.Prefetched:
    """Load a window's KV into the cache's memory."""
    receipt, tiers, cache_url = await prefetch_evict.prefetch(call.context, call.window_name)
    return responses.Prefetched(
        window_name=call.window_name,
        receipt=responses.Restored.model_validate(receipt),
        tiers={name: responses.LoadedTier(present=present) for name, present in tiers.items()},
        cache_url=cache_url,
        warnings=list(receipt.warnings),
    )


@operation("POST", "/admin/windows/{name}/evict", errors=("cache_unavailable",))
async def evict_window(call: Call) -> responses.Evicted:
    """Move a window's KV out of the cache's memory, down to the durable tiers."""
    return responses.Evicted.model_validate(await prefetch_evict.evict(call.context, call.window_name))


@operation(
    "POST", "/admin/windows/{name}/fanout", status=201, errors=("session_already_exists", "window_corrupted", *ENGINE)
)
async def fan_out_window(call: Call, body: requests.FanoutRequest) -> responses.FannedOut:
    """Thaw a window into many sessions at once. They share its KV, which is restored when the first of them begins."""
    sessions, window, warnings = await thaw.fanout(
        call.context, call.window_name, body.count, body.prefix, body.at_turn
    )
    return responses.FannedOut(
        window_name=window.name,
        model=window.model,
        token_count=window.token_count,
        kv=window.kv,
        block_count=window.chunk_count,
        sessions=[session.id for session in sessions],
        warnings=list(warnings),
    )


@operation("GET", "/admin/tree", answer=lineage.Tree)
async def show_tree(call: Call, query: requests.TreeQuery) -> Json:
    """Which window and which session came from which."""
    found = await tree.tree(call.services, call.tenant, query.limit)
    return {
        "nodes": await asyncio.to_thread(lambda: [_node(node) for node in found.nodes]),  # up to 20,000
        "windows": found.windows,
        "sessions": found.sessions,
        "truncated": found.truncated,
        "limit": query.limit,
    }


def _node(node: tree.Node) -> Json:
    return {
        "kind": node.kind,
        "name": node.name,
        "title": node.title,
        "state": node.state,
        "model": node.model,
        "token_count": node.token_count,
        "created_at": serializers.moment(node.created_at),
        "parent": _node_name(node.parent),
        "relation": node.relation,
        **({"missing_parent": _node_name(node.missing_parent)} if node.missing_parent else {}),
    }


def _node_name(node: tree.NodeName | None) -> Json | None:
    return {"kind": node[0], "name": node[1]} if node else None


OPERATIONS = (
    describe_window, verify_window, ask_window, prefetch_window, evict_window, fan_out_window, show_tree
)  # fmt: skip
