"""The MCP tools that create, use and change windows: a table over the admin API, which has all the rules."""

from urllib.parse import quote

from gateway.api.admin.models import lineage, responses, searches
from gateway.api.mcp import answers, arguments, old_fields
from gateway.api.mcp.admin_request import AdminRequest, Json
from gateway.api.mcp.tool import About, Tool
from gateway.errors import GatewayError

_BY_NAME = "POST /admin/windows/{window_name}"


def _ask_request(given: Json) -> AdminRequest:
    """To a window, or to those that match best."""
    name = given.pop("window_name", None)
    if name is None:
        if "at_turn" in given:
            message = "at_turn is a turn of one window, and window_name is not given"
            raise GatewayError("invalid_request", message, hint="give both or none", details={"field": "at_turn"})
        return AdminRequest("POST", "/admin/ask", body=given)
    for other in ("search", "max_windows", "timeout_seconds"):
        if other in given:
            message = f"{other} is for asking without window_name"
            raise GatewayError("invalid_request", message, hint="omit one of them", details={"field": other})
    return AdminRequest("POST", f"/admin/windows/{quote(name, safe='')}/ask", body=given)


_CREATING = (
    Tool(
        "window_freeze",
        ("POST /admin/windows",),
        About(
            "Save a session's whole context as a named window, to be restored later without loss",
            "before a risky step, at a milestone, before you end, or when the context is nearly full",
            "seconds: the last reply is computed once more and its KV is pinned; the session is not affected. During a "
            "turn it fails with `session_busy`: try again",
            "the window, and a `receipt` of what was actually stored; `kv` is `complete` or says what is missing",
        ),
        arguments.Freeze,
        (responses.Frozen,),
        shape=old_fields.frozen,
    ),
    Tool(
        "window_thaw",
        (f"{_BY_NAME}/thaw",),
        About(
            "Restore a window, or a turn of it, into a new session, or take an existing one back to it. The window "
            "stays as it is and can be thawed any number of times",
            "to continue from an earlier state, or in a branch of it",
            "the loading of its KV, and computing what is missing of that; no tokens with `warm_cache` false. With "
            "`into_session` the session loses what no window has, unless `keep_as` names one",
            "the `session_id` (send it as header X-Session-ID, or use the base URL /s/SESSION_ID/v1) and a "
            "`receipt`: `cached_tokens` is what the engine did not have to compute",
        ),
        arguments.Thaw,
        (responses.Thawed,),
        shape=old_fields.thawed,
        always=frozenset({"warm"}),
    ),
    Tool(
        "window_ask",
        (f"{_BY_NAME}/ask", "POST /admin/ask"),
        About(
            "Ask a frozen window a question: the model answers with that whole context. Nothing of it is kept. Without "
            "`window_name` the windows that match best are asked",
            "to consult a past self or another agent's work without loading that context into your own",
            "computing the question and the answer; the window's own tokens come from its KV, as `cached_tokens` "
            "shows. Up to `max_tokens` of answer",
            "the `answer`, its `finish_reason` (`length`: it was cut), and a `receipt`; without `window_name` these in "
            "`answers`",
        ),
        arguments.Ask,
        (responses.Answered, searches.AnsweredByAny),
        brief=("answers",),
        request_of=_ask_request,
    ),
    Tool(
        "window_clone",
        ("POST /admin/windows/{source_window}/clone",),
        About(
            "Give a window a second name, or with `isolate` make a copy that shares no cache with the first",
            "to branch off a window, to pass it on, or to keep it when the first is deleted",
            "next to nothing: no KV byte is copied",
            "the new window and `shared_blocks`",
        ),
        arguments.Clone,
        (responses.Cloned,),
        shape=old_fields.cloned,
        cleared=frozenset({"description"}),
    ),
    Tool(
        "window_fanout",
        (f"{_BY_NAME}/fanout",),
        About(
            "Thaw one window into several sessions at once, all of them or none",
            "to let several agents or attempts continue from the same context in parallel",
            "next to nothing: KV is restored when the first of them begins. window_prefetch loads it at once",
            "the ids of the new `sessions`",
        ),
        arguments.FanOut,
        (responses.FannedOut,),
    ),
)

_READING = (
    Tool(
        "window_list",
        ("GET /admin/windows",),
        About(
            "Find windows, newest first unless sorted otherwise. Filters are ANDed, tags too",
            "to see what there is, or to find the name of a window by tag, text or date",
            "cheap; some 150 tokens for each window in the answer, so set `limit`",
            "`windows`, one line for each, and `has_more` where `offset` would show more",
        ),
        arguments.WindowList,
        (answers.Windows,),
        shape=old_fields.windows,
    ),
    Tool(
        "window_search",
        ("GET /admin/search",),
        About(
            "Look for a text in everything that windows and sessions hold, the best match first",
            "when something was said or decided before, and you do not know where",
            "cheap, no tokens of the engine; some 150 tokens for each result, so set `limit`",
            "`results`, each with its name, its title, the place that matched and the text there; `all_words` false: "
            "nothing has all of the words",
        ),
        arguments.Search,
        (searches.SearchResults,),
    ),
    Tool(
        "window_status",
        ("GET /admin/windows/{window_name}", "GET /admin/sessions/{session_id}"),
        About(
            "Look closely at one window or at one session; give exactly one of the two",
            "before a thaw, or to see how full a session's context is",
            "cheap, but for `include_blocks`, which lists every KV object",
            "for a window its tokens, its `kv_cache` by tier as it is now, and its `receipt`; for a session its "
            "`state`, `token_count`, `context_limit`, its last `turns` with cached tokens, and its `windows`",
        ),
        arguments.Status,
        (answers.WindowStatus, answers.SessionStatus),
        brief=("blocks", "estimates", "kv_cache", "lineage", "saved", "timestamps", "turns"),
        shape=old_fields.status,
        adds=(("include_cache_stats", "cache_stats", old_fields.status_cache_stats),),
    ),
    Tool(
        "window_tree",
        ("GET /admin/tree",),
        About(
            "Show which window and which session came from which",
            "to find your way among branches: what was frozen, cloned, thawed or forked from what",
            "cheap; some 80 tokens for each node in the answer, so set `limit`",
            "`nodes`, oldest first, each with its `parent` and the `relation` to it; `truncated` where there are more",
        ),
        arguments.Tree,
        (lineage.Tree,),
        always=frozenset({"limit"}),
    ),
    Tool(
        "window_verify",
        (f"{_BY_NAME}/verify",),
        About(
            "Read every stored byte of a window and compare its checksum. Nothing is changed",
            "when a thaw was partial, or before you rely on a window and delete something else",
            "reading the whole window from disk and Redis: a second for some gigabytes, no tokens; `deep` computes the "
            "window's tokens again, and 16 more for each tier",
            "`ok`, what is `damaged`, and `chunks_usable`: how much from the start a thaw would find intact",
        ),
        arguments.Verify,
        (responses.Verified,),
        brief=("deep", "tiers"),
    ),
    Tool(
        "window_prefetch",
        (f"{_BY_NAME}/prefetch",),
        About(
            "Load a window's KV from disk or Redis into the cache's memory. No session is made",
            "shortly before a window_thaw or window_ask that should be fast",
            "the loading, and room in memory; no tokens",
            "a `receipt`: `partial` where something of it could not be loaded",
        ),
        arguments.Window,
        (responses.Prefetched,),
    ),
    Tool(
        "window_evict",
        (f"{_BY_NAME}/evict",),
        About(
            "Move a window's KV out of the cache's memory; disk and Redis keep it, and what neither has stays",
            "to make room in memory, when a window is not needed for a while",
            "reading the whole window once, no tokens; its next use loads it again",
            "`tiers`: how many objects were in each before and after, and how many were `kept` in memory",
        ),
        arguments.Window,
        (responses.Evicted,),
    ),
)

_CHANGING = (
    Tool(
        "window_describe",
        ("PATCH /admin/windows/{window_name}",),
        About(
            "Change the description or tags of a window, or how long it is kept. Its content never changes",
            "to make a window easy to find, or to let it expire",
            "next to nothing",
            "the window as it is now",
        ),
        arguments.Describe,
        (responses.Window,),
        cleared=frozenset({"description"}),
    ),
    Tool(
        "window_delete",
        ("DELETE /admin/windows/{window_name}",),
        About(
            "Delete a window for good. KV that other windows use stays, and sessions thawed from it keep working",
            "when a window is no longer needed; it cannot be undone",
            "next to nothing",
            "`blocks_deleted`, and `space_freed_bytes` as actually freed",
        ),
        arguments.Delete,
        (responses.WindowDeleted,),
        shape=old_fields.deleted,
        destroys=True,
    ),
)

TOOLS = (*_CREATING, *_READING, *_CHANGING)
