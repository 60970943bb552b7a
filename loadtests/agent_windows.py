"""Agents that keep their own context: each calls the gateway's tools of MCP, and what they did is looked at afterwards.

The scripted engine says which tools the agent calls. The calls, the client that makes them and what they do are real.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.agent_kinds import MODEL, Agent, AgentsSDK, ClaudeCode, Codex, Doing, OpenCode, ToolServer

_WITHIN_S = 120.0
_WORDS = "The gateway keeps what an agent has read. " * 40  # of a conversation with several chunks of KV


# Every verb that the gateway counts, as it must have ended.
_DONE = Counter((verb, "ok") for verb in ("freeze", "verify", "ask", "clone", "delete", "thaw")) + Counter(
    [("freeze", "window_already_exists")]
)


@dataclass(frozen=True, slots=True)
class Keeping:
    """One agent, told of the tools over one transport."""

    kind: type[Agent]
    stdio: bool

    @property
    def name(self) -> str:
        """What it is called where it is told of."""
        return f"its own windows over {'stdio' if self.stdio else 'http'}"

    def tools(self, url: str) -> ToolServer:
        """The gateway as the agent is told of it."""
        return ToolServer(url, self.stdio)


KEEPING = tuple(Keeping(kind, stdio) for kind in (ClaudeCode, Codex, OpenCode, AgentsSDK) for stdio in (False, True))


@dataclass(frozen=True, slots=True)
class Names:
    """What the agent shall call its session, its window and the branches of it."""

    session: str

    @property
    def window(self) -> str:
        """The window it freezes."""
        return f"w-{self.session}"

    @property
    def clone(self) -> str:
        """The clone it makes, and deletes again."""
        return f"c-{self.session}"

    @property
    def branch(self) -> str:
        """The session it thaws."""
        return f"t-{self.session}"


def names() -> Names:
    """New ones."""
    return Names(f"agent-{time.monotonic_ns()}")


def doing(kind: type[Agent], of: Names) -> Doing:
    """Every verb that an agent needs, one after the other, and one that must be refused."""
    window = {"window_name": of.window}
    calls: list[tuple[str, Mapping[str, Any]]] = [
        ("session_list", {"limit": 5}),
        ("window_freeze", {"session_id": of.session, **window, "description": "by the agent", "tags": ["tour"]}),
        ("window_freeze", {"session_id": of.session, **window}),
        ("window_list", {"tags": ["tour"], "limit": 5}),
        ("window_status", {**window, "include_lineage": True}),
        ("window_verify", window),
        ("window_ask", {**window, "question": "What were you told?", "max_tokens": 8}),
        ("window_clone", {"source_window": of.window, "target_window": of.clone}),
        ("window_delete", {"window_name": of.clone}),
        ("window_thaw", {**window, "new_session_id": of.branch}),
        ("window_tree", {"limit": 20}),
        ("cache_stats", {}),
        ("auto_freeze_check", {"session_id": of.session}),
    ]
    asked = " ".join(f"[[{kind.named}{tool} {_json(arguments)}]]" for tool, arguments in calls)
    return Doing(f"Keep your context. {asked}", expect=f"That is all after {len(calls)} steps")


def talk(url: str, of: Names) -> None:
    """Hold a conversation of that session with the model behind the gateway."""
    message = {"role": "user", "content": _WORDS}
    body = {"model": MODEL, "messages": [message], "max_tokens": 16}
    httpx.post(f"{url}/s/{of.session}/v1/chat/completions", json=body, timeout=_WITHIN_S).raise_for_status()


def verbs(url: str) -> Counter[tuple[str, str]]:
    """How often each verb ended how, as the gateway counts: nothing but the agents calls one on the tour."""
    rows = _get(url, "/admin/metrics")["metrics"]
    seen = ((row["labels"], row["value"]) for row in rows if row["name"] == "cwg_verbs_total")
    return Counter({(labels["verb"], labels["result"]): int(value) for labels, value in seen})


def check(url: str, of: Names, done: Mapping[tuple[str, str], int], *, real: bool) -> str:
    """Insist that it has all happened, and return what was seen. `real`: there is KV behind it."""
    window = _get(url, f"/admin/windows/{of.window}?include_lineage=true")
    branch = _get(url, f"/admin/sessions/{of.branch}")
    gone = httpx.get(f"{url}/admin/windows/{of.clone}").status_code
    wrong = [
        done != _DONE and f"the verbs were {done}",
        window["description"] != "by the agent" and f"the description is {window['description']!r}",
        window["tags"] != ["tour"] and f"the tags are {window['tags']}",
        (branch["state"], branch["window"]) != ("thawed", of.window) and f"the branch is {branch}",
        gone != 404 and f"the clone answers {gone}",
        real and window["kv"] != "complete" and f"its KV is {window['kv']}",
    ]
    if any(wrong):
        raise RuntimeError(f"{of.window} is not as the agent should have left it: {[one for one in wrong if one]}")
    return f"{window['token_count']} tokens, KV {window['kv']}, {window['block_count']} blocks"


def _get(url: str, path: str) -> dict[str, Any]:
    found = httpx.get(f"{url}{path}", timeout=_WITHIN_S)
    if found.status_code != 200:
        raise RuntimeError(f"{path}: {found.text}")
    answer: dict[str, Any] = found.json()
    return answer


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, separators=(",", ":"))
