"""The admin API's operations that look for something: in lists of windows, and in windows and sessions together."""

from typing import Any

from gateway.api.admin import serializers
from gateway.api.admin.models import requests, responses, searches
from gateway.api.endpoint import Call, error_shape
from gateway.api.operation import operation
from gateway.api.schemas import Json
from gateway.dialects.search_text import Search
from gateway.records import Session, Window
from gateway.store.search_rows import Found
from gateway.store.types import WindowQuery
from gateway.windows import ask_any
from gateway.windows.retention import orphans

_NOTHING = "no window has anything of this: none was asked"


@operation("GET", "/admin/windows", answer=responses.Windows)
async def list_windows(call: Call, query: requests.WindowsQuery) -> Json:
    """List windows, newest first unless sorted otherwise."""
    filters = query.model_dump(exclude_none=True, exclude={"sort_order"})
    wanted, store = WindowQuery(**filters, descending=query.sort_order == "desc"), call.services.store
    found: dict[str, Any] = {}
    if query.search:
        page, total, matches, truncated = await store.search_windows(call.tenant, wanted)
        found = {"truncated": truncated}
    else:
        page, total = await store.listed_windows(call.tenant, wanted)
        matches = []
    lines = [{**serializers.window_line_fields(w, call.now), "saved": saved} for w, saved in page]
    for line, match in zip(lines, matches, strict=False):  # none without a search
        line["match"] = match
    return {"windows": lines, **serializers.paging(len(page), total, query.limit, query.offset), **found}


@operation("GET", "/admin/search")
async def search(call: Call, query: requests.SearchQuery) -> searches.SearchResults:
    """Look for a text in windows and sessions, the best match first."""
    await call.services.recorder.flush()
    store, every = call.services.store, True
    found, truncated = await store.search(call.tenant, Search(query.q), query.limit)
    if not found:
        every = False
        found, truncated = await store.search(call.tenant, Search(query.q, every=False), query.limit)
    return searches.SearchResults(
        query=query.q, results=[_result(call, one) for one in found], all_words=every, truncated=truncated
    )


def _result(call: Call, found: Found) -> searches.SearchResult:
    record = found.record
    return searches.SearchResult(
        kind=found.kind,
        name=found.name,
        title=record.title,
        model=record.model,
        state=_state(call, record),
        token_count=record.token_count,
        created_at=serializers.moment(record.created_at),
        match=responses.Match.model_validate(found.match),
    )


def _state(call: Call, record: Window | Session) -> str:
    if isinstance(record, Window):
        return "expired" if record.has_expired(call.now) else "frozen"
    return "expired" if record.last_active_at < orphans.expired_by(call.services.settings) else record.state


@operation("POST", "/admin/ask")
async def ask_any_window(call: Call, body: requests.AskAnyRequest) -> searches.AnsweredByAny:
    """Ask the windows that match a question best. Nothing of it is kept."""
    ctx = call.context
    asked = await ask_any.ask_any(
        ctx, body.question, search=body.search, max_windows=body.max_windows, max_tokens=body.max_tokens,
        timeout_s=body.timeout_seconds,
    )  # fmt: skip
    return searches.AnsweredByAny(
        question=body.question,
        answers=[_asked(one) for one in asked],
        warnings=[] if asked else [_NOTHING],
        duration_ms=ctx.duration_ms(),
    )


def _asked(one: ask_any.Asked) -> searches.AskedWindow:
    answer = one.answer
    return searches.AskedWindow(
        window_name=one.window.name,
        title=one.window.title,
        match=responses.Match.model_validate(one.match),
        model=one.window.model,
        answer=answer.text if answer else None,
        reasoning=answer.reasoning if answer else None,
        finish_reason=answer.finish_reason if answer else None,
        receipt=serializers.ask_receipt(answer) if answer else None,
        warnings=list(answer.restored.warnings) if answer else [],
        error=responses.ErrorInfo(**error_shape(one.error)["error"]) if one.error else None,
    )


OPERATIONS = (list_windows, search, ask_any_window)
