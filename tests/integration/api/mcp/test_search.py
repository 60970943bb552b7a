"""Searches and questions to whichever windows match, over MCP."""

import pytest
from mcp import Client

from tests.support.gateway_process import Gateway
from tests.support.mcp_answers import answer, refusal

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("client", ["http", "stdio-legacy"], indirect=True)
async def test_mcp_search_and_ask(client: Client, gateway: Gateway, session: str) -> None:
    word = f"quagga{session.removeprefix('s-')}"
    gateway.chat(session, f"The {word} is striped in front only.")
    name = f"w-{session}"
    await answer(client, "window_freeze", session_id=session, window_name=name)
    results = (await answer(client, "window_search", query=word))["results"]
    assert [one["name"] for one in results] == [name, session]
    assert (await answer(client, "window_list", search=word))["windows"][0]["match"]["message"] == 0
    answers = (await answer(client, "window_ask", question=f"Where is the {word}?"))["answers"]
    assert [(one["window_name"], one["answer"]) for one in answers] == [(name, "Hello there!")]
    assert (await answer(client, "window_ask", question="What?", window_name=name))["answer"] == "Hello there!"
    code, text = await refusal(client, "window_ask", question="What?", window_name=name, max_windows=2)
    assert (code, "max_windows" in text) == ("invalid_request", True)
    code, text = await refusal(client, "window_ask", question="What?", at_turn=1)
    assert (code, "window_name is not given" in text) == ("invalid_request", True)
