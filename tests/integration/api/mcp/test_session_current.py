"""Which session an agent is in, as its own client says it, or said to be unknown."""

import subprocess
import sys

import pytest

from tests.support.gateway_process import ROOT, Gateway, environment
from tests.support.mcp_answers import answer, refusal
from tests.support.mcp_clients import over_http, over_stdio

pytestmark = pytest.mark.anyio


async def test_a_client_that_sends_no_id_is_told_how_to_find_out(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    for connect in (over_http, over_stdio):
        async with connect(gateway.url) as client:
            current = await answer(client, "session_current")
            assert (current["session_id"], current["recognised_by"], current["sessions"]) == (None, None, [])
            for word in ("unknown", "X-Session-ID", "CWG_SESSION_ID", "session_list"):
                assert word in current["message"]


@pytest.mark.parametrize("header", ["x-session-id", "session-id", "x-claude-code-session-id"])
async def test_the_session_is_that_of_the_header_that_the_client_sends(
    gateway: Gateway, session: str, header: str
) -> None:
    async with over_http(gateway.url, **{header: session}) as client:
        before = await answer(client, "session_current")
        assert (before["session_id"], before["recognised_by"], before["sessions"]) == (session, f"header {header}", [])
        assert "no finished turn" in before["message"]
        messages = [{"role": "user", "content": "hi"}]
        headers = {header: session}
        assert gateway.http.post("/v1/chat/completions", json={"model": "demo", "messages": messages}, headers=headers)
        now = await answer(client, "session_current")
        assert (now["session_id"], [one["id"] for one in now["sessions"]]) == (session, [session])
        assert (await answer(client, "window_freeze", session_id=now["session_id"], window_name=f"w-{session}"))["name"]


async def test_of_several_conversations_under_one_id_none_is_guessed(gateway: Gateway, session: str) -> None:
    headers = {"x-claude-code-session-id": session}
    for text in ("Make a title", "The conversation itself"):
        body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
        assert gateway.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    async with over_http(gateway.url, **headers) as client:
        current = await answer(client, "session_current")
    assert (current["session_id"], len(current["sessions"])) == (None, 2)
    assert all(one["id"].startswith(session) for one in current["sessions"])
    assert "stands for several conversations" in current["message"]


async def test_an_agent_that_moved_to_a_window_is_not_told_that_it_is_where_it_was(
    gateway: Gateway, session: str
) -> None:
    gateway.chat(f"{session}-other")
    gateway.freeze(f"{session}-other", f"w-{session}")
    headers, branches = {"session-id": session}, []
    window = f"/w/w-{session}"
    for base, text in (("", "before"), (window, "work"), (window, "a title, please")):
        body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
        said = gateway.http.post(f"{base}/v1/chat/completions", json=body, headers=headers)
        branches.append(said.headers["x-session-id"])
        gateway.turns(branches[-1])
    async with over_http(gateway.url, **headers) as client:
        current = await answer(client, "session_current")
    assert (current["session_id"], {one["id"] for one in current["sessions"]}) == (None, set(branches))


async def test_over_stdio_the_environment_says_it(gateway: Gateway, session: str) -> None:
    gateway.chat(session)
    async with over_stdio(gateway.url, session_id=session) as client:
        current = await answer(client, "session_current")
    assert (current["session_id"], current["message"]) == (
        session,
        f"you are in session {session}, by the id that your client sends (header x-session-id)",
    )


async def test_an_id_that_no_session_can_have_is_refused(gateway: Gateway) -> None:
    async with over_http(gateway.url, **{"x-session-id": "../a"}) as client:
        assert (await refusal(client, "session_current"))[0] == "invalid_session_id"


def test_over_stdio_such_an_id_is_refused_at_the_start() -> None:
    command = [sys.executable, "-m", "gateway", "mcp"]
    ended = subprocess.run(
        command, env=environment({"CWG_SESSION_ID": "../a"}), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr.partition(":")[0]) == (1, "error")
    assert "CWG_SESSION_ID '../a' is no session id" in ended.stderr
