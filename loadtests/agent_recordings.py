"""Requests of real agents, shortened and anonymised: the fixture of the tests of session identity.

Texts are cut, with their length and a hash in place of the rest, so equal texts stay equal and different ones stay
different. Ids, device keys and times are kept as they were sent; directory names are replaced.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

_SHOWN = 96  # characters of a text
_QUESTION = 1000  # characters of a question with tool calls
_SCHEMAS = ("parameters", "input_schema")
# These describe the connection or the client's machine.
_DROPPED = frozenset(
    {"host", "connection", "accept-encoding", "content-length", "accept", "authorization", "x-api-key"}
)
_HARDWARE = ("x-stainless-arch", "x-stainless-os", "x-stainless-runtime-version")


@dataclass(frozen=True, slots=True)
class Recording:
    """One scenario of an agent, as the engine recorded its requests."""

    agent: str
    version: str
    scenario: str
    lines: Sequence[str]


def write(file: Path, recordings: Sequence[Recording], folder: Path) -> None:
    """Write the fixture."""
    cleaned = [_cleaned(recording, folder) for recording in recordings]
    about = (
        "Requests of real agents to an engine (python -m loadtests.agents_tour --record). `conversation` is the "
        "true one, known from what the agent was asked to do. Texts are cut: '...[characters, hash]'. Tool schemas "
        "are left out."
    )
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"about": about, "recordings": cleaned}, indent=1, ensure_ascii=False) + "\n")


def _cleaned(recording: Recording, folder: Path) -> dict[str, Any]:
    requests = [json.loads(line.replace(str(folder), "/home/user")) for line in recording.lines]
    posts = [_request(r) for r in requests if r["method"] == "POST"]
    probes = sorted({f"{r['method']} {r['target']}" for r in requests if r["method"] != "POST"})
    return {"agent": recording.agent, "version": recording.version, "scenario": recording.scenario, "probes": probes,
            "requests": posts}  # fmt: skip


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    headers = {k: v for k, v in request["headers"] if k not in _DROPPED and k not in _HARDWARE}
    body = json.loads(request["body"])
    return {
        "conversation": _conversation(headers, body),
        "target": request["target"],
        "headers": headers,
        "body": _cut(body),
    }


def _conversation(headers: Mapping[str, str], body: Mapping[str, Any]) -> str:
    """Which conversation a request truly belongs to, known from what the scenarios do."""
    text = json.dumps(body)
    if "You are a title generator" in text:
        return "title"
    if "This session is being continued from a previous conversation" in text:
        return "compacted"
    if "Respond with TEXT ONLY" in text and "detailed summary" in text:
        return "compacting"
    if "Another way." in text:
        return "fork"
    users = [m for m in body.get("messages", body.get("input")) if _is_user_message(m)]
    return "sub" if any("You are the sub." in _opening(m) for m in users) else "main"


def _is_user_message(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def _opening(message: Mapping[str, Any]) -> str:
    """The text of a message in front of any tool calls that it asks for."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "\n".join(re.split(r"\[\[", text, maxsplit=1)[0] for text in texts)


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        # The scripted engine must still find the tool calls in a question.
        return value if value.startswith("{") or ("[[" in value and len(value) < _QUESTION) else _short(value)
    if isinstance(value, list):
        return [_cut(item) for item in value]
    if isinstance(value, dict):
        return {k: {} if k in _SCHEMAS else _short(v) if k == "description" else _cut(v) for k, v in value.items()}
    return value


def _short(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}...[{len(text)}, {sha256(text.encode()).hexdigest()[:8]}]"
