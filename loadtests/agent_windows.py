"""Agents that manage their own context through the gateway's MCP tools, and checks of the result.

The scripted engine decides which tools the agent calls. The calls, the client that makes them and their effects are
real.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.agent_kinds import MODEL, Agent, AgentRun, AgentsSDK, ClaudeCode, Codex, OpenCode, ToolServer

_TIMEOUT_S = 120.0
_WORDS = "The gateway keeps what an agent has read. " * 40  # enough text for several chunks of KV


# The operations that the gateway must have counted, with their results.
_EXPECTED_OPERATIONS = Counter((name, "ok") for name in ("freeze", "verify", "ask", "clone", "delete", "thaw")) + (
    Counter([("freeze", "window_already_exists")])
)


@dataclass(frozen=True, slots=True)
class ToolScenario:
    """One agent with the gateway's tools over one transport."""

    kind: type[Agent]
    stdio: bool

    @property
    def name(self) -> str:
        """The scenario's name in the output."""
        return f"own windows over {'stdio' if self.stdio else 'http'}"

    def tools(self, url: str) -> ToolServer:
        """The gateway's MCP server as configured in the agent."""
        return ToolServer(url, self.stdio)


TOOL_SCENARIOS = tuple(
    ToolScenario(kind, stdio) for kind in (ClaudeCode, Codex, OpenCode, AgentsSDK) for stdio in (False, True)
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that the agent uses for its session, its window, a clone and a branch."""

    session: str

    @property
    def window(self) -> str:
        """The window that the agent freezes."""
        return f"w-{self.session}"

    @property
    def clone(self) -> str:
        """The clone that it makes and deletes."""
        return f"c-{self.session}"

    @property
    def branch(self) -> str:
        """The session that it thaws."""
        return f"t-{self.session}"


def new_names() -> Names:
    """Return names that are not used yet."""
    return Names(f"agent-{time.monotonic_ns()}")


def operations_run(kind: type[Agent], of: Names) -> AgentRun:
    """A run that calls every operation an agent needs, one after the other, and one that must be refused."""
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
    tool_calls = " ".join(f"[[{kind.tool_prefix}{tool} {_json(arguments)}]]" for tool, arguments in calls)
    return AgentRun(f"Keep your context. {tool_calls}", expect=f"That is all after {len(calls)} steps")


def talk(url: str, of: Names) -> None:
    """Send one turn of that session to the model behind the gateway."""
    message = {"role": "user", "content": _WORDS}
    body = {"model": MODEL, "messages": [message], "max_tokens": 16}
    httpx.post(f"{url}/s/{of.session}/v1/chat/completions", json=body, timeout=_TIMEOUT_S).raise_for_status()


def operation_counts(url: str) -> Counter[tuple[str, str]]:
    """The gateway's counts by operation and result; on the tour only the agents call any."""
    rows = _get(url, "/admin/metrics")["metrics"]
    counts = ((row["labels"], row["value"]) for row in rows if row["name"] == "cwg_verbs_total")
    return Counter({(labels["verb"], labels["result"]): int(value) for labels, value in counts})


def check(url: str, of: Names, operations: Mapping[tuple[str, str], int], *, real: bool) -> str:
    """Check the effects of every operation, and return a summary. `real`: the engine stores KV. Raises RuntimeError."""
    window = _get(url, f"/admin/windows/{of.window}?include_lineage=true")
    branch = _get(url, f"/admin/sessions/{of.branch}")
    gone = httpx.get(f"{url}/admin/windows/{of.clone}").status_code
    wrong = [
        operations != _EXPECTED_OPERATIONS and f"the operations were {operations}",
        window["description"] != "by the agent" and f"the description is {window['description']!r}",
        window["tags"] != ["tour"] and f"the tags are {window['tags']}",
        (branch["state"], branch["window"]) != ("thawed", of.window) and f"the branch is {branch}",
        gone != 404 and f"the clone answers {gone}",
        real and window["kv"] != "complete" and f"its KV is {window['kv']}",
    ]
    if any(wrong):
        raise RuntimeError(f"{of.window} is not in the expected state: {[fault for fault in wrong if fault]}")
    return f"{window['token_count']} tokens, KV {window['kv']}, {window['block_count']} blocks"


def _get(url: str, path: str) -> dict[str, Any]:
    response = httpx.get(f"{url}{path}", timeout=_TIMEOUT_S)
    if response.status_code != 200:
        raise RuntimeError(f"{path}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def _json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, separators=(",", ":"))
