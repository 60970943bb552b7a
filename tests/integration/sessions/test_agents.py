"""What real agents send (tests/recordings/agents.json), played back: each of their conversations is one session."""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from gateway.api.inference.request import TURNS
from loadtests.scripted_engine import ScriptedEngine
from tests.support.gateway_process import ROOT, Gateway, gateway_in_front_of

_FILE = ROOT / "tests" / "recordings" / "agents.json"
_ALL: list[dict[str, Any]] = json.loads(_FILE.read_text())["recordings"]
_PATHS = {path.decode() for path in TURNS}
RECORDINGS = [r for r in _ALL if r["requests"][0]["target"].partition("?")[0] in _PATHS]
# These continue a stored response, and cannot be recognised without its id.
BY_RESPONSE = [r for r in RECORDINGS if any("previous_response_id" in q["body"] for q in r["requests"])]
# Names of sessions and agents, and nothing that the conversation itself is made of.
_ID_HEADERS = ("session", "agent-id", "thread", "codex", "subagent", "client-request-id")
_RESPONSE_ID = re.compile(r'"(resp_[^"]+)"')
_ID_FIELDS = ("metadata", "client_metadata", "prompt_cache_key")


@pytest.fixture(scope="module")
def before_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    engine = ScriptedEngine(0)
    thread = threading.Thread(target=engine.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{engine.server_port}"
        with gateway_in_front_of(url, tmp_path_factory.mktemp("agents")) as gateway:
            yield gateway
    finally:
        engine.shutdown()
        thread.join()
        engine.server_close()


def _title(recording: Mapping[str, Any]) -> str:
    return f"{recording['agent']}: {recording['scenario']}"


@pytest.mark.parametrize("recording", RECORDINGS, ids=_title)
def test_each_conversation_of_an_agent_is_a_session_by_its_ids(
    before_script: Gateway, recording: dict[str, Any]
) -> None:
    # The conversation itself is asked for its summary.
    _check(before_script, _played(before_script, _named(recording, {"compacting": "main"}), "with ids"))


@pytest.mark.parametrize("recording", [r for r in RECORDINGS if r not in BY_RESPONSE], ids=_title)
def test_each_conversation_of_an_agent_is_a_session_without_any_id(
    before_script: Gateway, recording: dict[str, Any]
) -> None:
    # Only the fork continues that point: without ids, that is how a conversation continues.
    requests = [_stripped(request) for request in recording["requests"]]
    named = _named({**recording, "requests": requests}, {"fork": "main"})
    _check(before_script, _played(before_script, named, "without ids"))


def _named(recording: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The recording with other names for some conversations."""
    requests = [{**r, "conversation": names.get(r["conversation"], r["conversation"])} for r in recording["requests"]]
    return {**recording, "requests": requests}


def _played(gateway: Gateway, recording: Mapping[str, Any], scope: str) -> dict[str, list[str]]:
    """Play a recording; return the sessions of each of its conversations, request by request."""
    sessions: defaultdict[str, list[str]] = defaultdict(list)
    last = ""
    for request in recording["requests"]:
        # Its salt keeps it apart from the same texts in another test.
        body = {**request["body"], "cache_salt": f"{_title(recording)}, {scope}"}
        if "previous_response_id" in body:
            body["previous_response_id"] = last
        answer = gateway.http.post(request["target"], json=body, headers=request["headers"])
        assert answer.status_code == 200, answer.text
        last = (_RESPONSE_ID.findall(answer.text) or [""])[-1]
        sessions[request["conversation"]].append(answer.headers["x-session-id"])
    return dict(sessions)


def _check(gateway: Gateway, played: Mapping[str, Sequence[str]]) -> None:
    """Each conversation is one session and no two are the same; a fork has the lineage, and so the KV, of its stem."""
    names = {conversation: set(ids) for conversation, ids in played.items()}
    assert all(len(ids) == 1 for ids in names.values()), played
    assert len(set.union(*names.values())) == len(names), played
    for conversation, ids in played.items():
        turns = gateway.turns(ids[0], len(ids))
        assert [turn["outcome"] for turn in turns] == ["completed"] * len(ids), conversation
        assert all(turn["prompt_tokens"] for turn in turns), conversation
    if "fork" in played:
        lineages = {gateway.http.get(f"/admin/sessions/{played[of][0]}").json()["lineage"] for of in ("main", "fork")}
        assert len(lineages) == 1, "a fork recomputes what it shares"


def _stripped(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request without any id of a session, an agent or a device."""
    headers = {k: v for k, v in request["headers"].items() if not any(part in k for part in _ID_HEADERS)}
    body = {k: v for k, v in request["body"].items() if k not in _ID_FIELDS}
    return {**request, "headers": headers, "body": body}
