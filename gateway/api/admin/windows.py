"""The admin API's operations on existing windows."""

from gateway.api.admin import models, serializers
from gateway.api.admin.models import requests
from gateway.api.endpoint import Call
from gateway.api.operation import ENGINE, operation
from gateway.windows import ask, describe, evict, fanout, prefetch, tree, verify


@operation("PATCH", "/admin/windows/{name}")
async def describe_window(call: Call, body: requests.DescribeRequest) -> models.Window:
    """Change what is said of a window; null clears it."""
    window = await describe.describe(call.services, call.tenant, call.window_name, body.given())
    return models.Window(**serializers.window_fields(window))


@operation("POST", "/admin/windows/{name}/verify", errors=("cache_unavailable", *ENGINE))
async def verify_window(call: Call, body: requests.VerifyRequest) -> models.Verified:
    """Check every byte of a window where it is pinned."""
    deep = body.deep
    verdict = await verify.verify(call.services, call.tenant, call.window_name, call.progress, deep=deep)
    return models.Verified.model_validate(verdict)


@operation("POST", "/admin/windows/{name}/ask", errors=("window_corrupted", *ENGINE))
async def ask_window(call: Call, body: requests.AskRequest) -> models.Answered:
    """Ask a window a question; the window does not change, and nothing is kept of it."""
    said = await ask.ask(call.services, call.tenant, call.window_name, body.question, body.max_tokens, call.progress)
    return models.Answered(
        window_name=said.window.name,
        model=said.window.model,
        answer=said.text,
        reasoning=said.reasoning,
        finish_reason=said.finish_reason,
        receipt=models.AskReceipt(
            prompt_tokens=said.usage.prompt,
            cached_tokens=said.usage.cached,
            computed_tokens=said.computed_tokens,
            completion_tokens=said.usage.completion,
            chunks_expected=said.restored.chunks_expected,
            chunks_found=said.restored.chunks_found,
            partial=said.restored.partial,
            duration_ms=said.duration_ms,
        ),
        warnings=said.restored.warnings,
    )


@operation("POST", "/admin/windows/{name}/prefetch", errors=("cache_unavailable", *ENGINE))
async def prefetch_window(call: Call) -> models.Prefetched:
    """Load a window's KV into the cache's memory."""
    receipt = await prefetch.prefetch(call.services, call.tenant, call.window_name, call.progress)
    restored = models.Restored.model_validate(receipt)
    return models.Prefetched(window_name=call.window_name, receipt=restored, warnings=receipt.warnings)


@operation("POST", "/admin/windows/{name}/evict", errors=("cache_unavailable",))
async def evict_window(call: Call) -> models.Evicted:
    """Move a window's KV out of the cache's memory, down to the durable tiers."""
    evicted = await evict.evict(call.services, call.tenant, call.window_name, call.progress)
    return models.Evicted.model_validate(evicted)


@operation(
    "POST", "/admin/windows/{name}/fanout", status=201, errors=("session_already_exists", "window_corrupted", *ENGINE)
)
async def fan_out_window(call: Call, body: requests.FanoutRequest) -> models.FannedOut:
    """Thaw a window into many sessions at once; they share its KV, which is put back when the first of them begins."""
    sessions, window, warnings = await fanout.fanout(
        call.services, call.tenant, call.window_name, body.count, body.prefix
    )
    return models.FannedOut(
        window_name=window.name,
        model=window.model,
        token_count=window.token_count,
        kv=window.kv,
        block_count=window.chunk_count,
        sessions=[session.id for session in sessions],
        warnings=warnings,
    )


@operation("GET", "/admin/tree")
async def show_tree(call: Call, query: requests.TreeQuery) -> models.Tree:
    """Which window and which session came from which."""
    limit = query.limit
    seen = await tree.tree(call.services, call.tenant, limit)
    return models.Tree(
        nodes=[_node(node) for node in seen.nodes],
        windows=seen.windows,
        sessions=seen.sessions,
        truncated=seen.truncated,
        limit=limit,
    )


def _node(node: tree.Node) -> models.Node:
    return models.Node(
        kind=node.kind,
        name=node.name,
        state=node.state,
        model=node.model,
        token_count=node.token_count,
        created_at=serializers.moment(node.created_at),
        parent=models.NodeName(kind=node.parent[0], name=node.parent[1]) if node.parent else None,
        relation=node.relation,
    )


OPERATIONS = (
    describe_window, verify_window, ask_window, prefetch_window, evict_window, fan_out_window, show_tree
)  # fmt: skip
