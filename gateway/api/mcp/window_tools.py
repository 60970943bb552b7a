"""The MCP tools that create, use and change windows: a table over the admin API, which has all the rules."""

from gateway.api.admin import models
from gateway.api.mcp import answers
from gateway.api.mcp import parameters as params
from gateway.api.mcp.tool import About, Tool
from gateway.store.types import SORT_KEYS
from gateway.windows import ask, fanout, tree

_WHAT_IT_IS = "what it is, for whoever finds it later"
_BY_NAME = "POST /admin/windows/{window_name}"

_MAKING = (
    Tool(
        "window_freeze",
        ("POST /admin/windows",),
        About(
            "Save a session's whole context as a named window, to be restored later without loss",
            "before a risky step, at a milestone, before you end, or when the context is nearly full",
            "seconds: the last reply is computed once more and its KV is pinned; the session goes on unharmed. In the "
            "middle of a turn it is `session_busy`: try again",
            "the window, and a `receipt` of what was really stored; `kv` is `complete` or says what is missing",
        ),
        {
            "session_id": params.session(required=True),
            "window_name": params.window(required=True),
            "description": params.description(_WHAT_IT_IS),
            "tags": params.tags(),
            "ttl_seconds": params.seconds("seconds it is kept for; for ever if not given"),
        },
        (models.Frozen,),
    ),
    Tool(
        "window_thaw",
        (f"{_BY_NAME}/thaw",),
        About(
            "Restore a window into a new session. The window stays as it is and can be thawed any number of times",
            "to go on from an earlier state, or in a branch of it",
            "the loading of its KV, and computing what is missing of that; no tokens with `warm_cache` false",
            "the new `session_id` (send it as header X-Session-ID, or use the base URL /s/SESSION_ID/v1) and a "
            "`receipt`: `cached_tokens` is what the engine really did not have to compute",
        ),
        {
            "window_name": params.window(required=True),
            "new_session_id": params.session("id for the new session; generated if not given"),
            "continuation_prompt": params.said(ask.MAX_QUESTION)("sent at once as the new session's next user turn"),
            "max_tokens": params.whole(1, ask.MAX_TOKENS)(
                f"most tokens of the answer to continuation_prompt; default {ask.USUAL_TOKENS}"
            ),
            "warm_cache": params.warm(
                "how far up to load now: true or `gpu`: into the engine, and measured; `cpu`: into memory; false or "
                "`none`: with the first request. Default true",
                wire="warm",
                also=("warm",),
            ),
        },
        (models.Thawed,),
        defaults={"warm_cache": "gpu"},
    ),
    Tool(
        "window_ask",
        (f"{_BY_NAME}/ask",),
        About(
            "Ask a frozen window a question: the model answers with that whole context before it. Nothing of it stays",
            "to consult a past self or another agent's work without loading that context into your own",
            "computing the question and the answer; the window's own tokens come from its KV, as `cached_tokens` "
            "tells. Up to `max_tokens` of answer",
            "the `answer`, its `finish_reason` (`length`: it was cut), and a `receipt`",
        ),
        {
            "window_name": params.window(required=True),
            "question": params.said(ask.MAX_QUESTION)("what to ask; the window knows nothing later", required=True),
            "max_tokens": params.whole(1, ask.MAX_TOKENS)(f"most tokens of answer; default {ask.USUAL_TOKENS}"),
        },
        (models.Answered,),
    ),
    Tool(
        "window_clone",
        ("POST /admin/windows/{source_window}/clone",),
        About(
            "Give a window a second name, or with `isolate` make a copy that shares no cache with the first",
            "to branch off a window, to hand it on, or to keep it when the first is deleted",
            "next to nothing: no KV byte is copied",
            "the new window and `shared_blocks`",
        ),
        {
            "source_window": params.window(required=True),
            "target_window": params.window("name of the clone", required=True, also=("new_window_name",)),
            "description": params.description(_WHAT_IT_IS),
            "tags": params.tags("tags of the clone; those of the source if not given"),
            "isolate": params.flag("under a cache salt of its own; default false"),
        },
        (models.Cloned,),
    ),
    Tool(
        "window_fanout",
        (f"{_BY_NAME}/fanout",),
        About(
            "Thaw one window into several sessions at once, all of them or none",
            "to let several agents or attempts go on from the same context side by side",
            "next to nothing: KV is looked at when the first of them begins. window_prefetch loads it at once",
            "the ids of the new `sessions`",
        ),
        {
            "window_name": params.window(required=True),
            "count": params.whole(1, fanout.MOST)("how many sessions", required=True),
            "prefix": params.session("the sessions are PREFIX-1, PREFIX-2 and so on; generated if not given"),
        },
        (models.FannedOut,),
    ),
)

_LOOKING = (
    Tool(
        "window_list",
        ("GET /admin/windows",),
        About(
            "Find windows, newest first unless sorted otherwise. Filters are ANDed, tags too",
            "to see what was kept, or to find the name of a window by tag, text or date",
            "cheap; some 150 tokens for each window in the answer, so set `limit`",
            "`windows`, one line for each, and `has_more` where `offset` would show more",
        ),
        {
            "tags": params.tags("only with all of these tags"),
            "model": params.text(500)("only of this model"),
            "session_id": params.session("only frozen from this session"),
            "search": params.text(200)("only with this text in name or description"),
            "created_after": params.text(64)("ISO 8601 date or time"),
            "created_before": params.text(64)("ISO 8601 date or time"),
            "sort_by": params.one_of(*SORT_KEYS, total_size_bytes="size")("default created_at"),
            "sort_order": params.one_of("asc", "desc")("default desc"),
            "limit": params.limit("how many to answer with"),
            "offset": params.offset("how many to leave out first"),
        },
        (models.Windows,),
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
        {
            "window_name": params.window(),
            "session_id": params.session(),
            "include_blocks": params.flag("windows only: list every KV object"),
            "include_lineage": params.flag("windows only: its parent, ancestors and clones"),
            "include_cache_stats": params.flag("accepted; a window's cache is always told", wire=""),
        },
        (answers.WindowStatus, answers.SessionStatus),
        brief=("blocks", "estimates", "kv_cache", "lineage", "timestamps", "turns"),
        shape=answers.typed,
    ),
    Tool(
        "window_tree",
        ("GET /admin/tree",),
        About(
            "Tell which window and which session came from which",
            "to find your way among branches: what was frozen, cloned, thawed or forked from what",
            "cheap; some 80 tokens for each node in the answer, so set `limit`",
            "`nodes`, oldest first, each with its `parent` and the `relation` to it; `truncated` where there are more",
        ),
        {"limit": params.whole(1, tree.MOST)("the newest windows and the last active sessions, of each; default 100")},
        (models.Tree,),
        defaults={"limit": 100},
    ),
    Tool(
        "window_verify",
        (f"{_BY_NAME}/verify",),
        About(
            "Read every stored byte of a window and compare its checksum. Nothing is changed",
            "when a thaw was partial, or before you rely on a window and delete something else",
            "reading the whole window from disk and Redis: a second for some gigabytes, no tokens; `deep` computes the "
            "window's tokens anew, and 16 more for each tier",
            "`ok`, what is `damaged`, and `chunks_usable`, the beginning that a thaw would find whole",
        ),
        {
            "window_name": params.window(required=True),
            "deep": params.flag("have the engine use the KV of each tier and compare what it says; default false"),
        },
        (models.Verified,),
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
        {"window_name": params.window(required=True)},
        (models.Prefetched,),
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
        {"window_name": params.window(required=True)},
        (models.Evicted,),
    ),
)

_CHANGING = (
    Tool(
        "window_describe",
        ("PATCH /admin/windows/{window_name}",),
        About(
            "Change what is said of a window: description, tags, how long it is kept. What it holds never changes",
            "to make a window easy to find, or to let it expire",
            "next to nothing",
            "the window as it is now",
        ),
        {
            "window_name": params.window(required=True),
            "description": params.description("the new one; empty to clear it"),
            "tags": params.tags("the new ones, all of them; empty to clear them"),
            "ttl_seconds": params.seconds_or_none("seconds it is kept for from now on; 0: for ever"),
        },
        (models.Window,),
    ),
    Tool(
        "window_delete",
        ("DELETE /admin/windows/{window_name}",),
        About(
            "Delete a window for good. KV that other windows hold stays, and sessions thawed from it go on",
            "when a window is not needed any more; it cannot be undone",
            "next to nothing",
            "`blocks_deleted`, and `space_freed_bytes` as really freed",
        ),
        {
            "window_name": params.window(required=True),
            "delete_blocks": params.one_of(True)("KV that nobody else holds always goes with it", wire=""),
            "force": params.flag("accepted; nothing asks for confirmation", wire=""),
        },
        (models.WindowDeleted,),
        destroys=True,
    ),
)

TOOLS = (*_MAKING, *_LOOKING, *_CHANGING)
