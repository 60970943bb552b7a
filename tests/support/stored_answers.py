"""Requests to the Responses API."""

import json
from typing import Any

import httpx

from gateway.records import Session, StoredResponse, Trace, Turn
from gateway.store.types import TurnRecord
from tests.support.fakes.engine import MODEL
from tests.support.fakes.responses import PATH
from tests.support.gateway_process import Gateway

TOOL = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}


def ask(gateway: Gateway, text: Any, previous: str | None = None, session: str = "", **more: Any) -> httpx.Response:
    """Send one request."""
    body = {"model": MODEL, "input": text, **more} | ({"previous_response_id": previous} if previous else {})
    response = gateway.http.post(PATH, json=body, headers={"x-session-id": session} if session else {})
    assert response.status_code == 200, response.text
    return response


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The response object, streamed or not."""
    if response.headers["content-type"] == "application/json":
        whole: dict[str, Any] = response.json()
        return whole
    last: dict[str, Any] = json.loads(response.text.strip().rpartition("data: ")[2])["response"]
    return last


def error_of(response: httpx.Response) -> tuple[int, str, Any]:
    """Status, code and parameter of an error in OpenAI's shape."""
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return response.status_code, error["code"], error["param"]


def texts(request: Any) -> list[tuple[str, str]]:
    """Who said what in the input that the engine got."""
    return [
        (item["role"], item["content"] if isinstance(item["content"], str) else item["content"][0]["text"])
        for item in request.json["input"]
    ]


def finished(response_id: str, tenant: str = "default", session: str = "s", at: float = 1.0) -> TurnRecord:
    """A turn with an answer that is kept."""
    turn = Turn(tenant, session, MODEL, "completed", 200, at, 1.0)
    answer = {"id": response_id, "output": [], "instructions": "long", "tools": []}
    messages = [{"role": "user", "content": response_id}, {"role": "assistant", "content": "a"}]
    response = StoredResponse(tenant, response_id, session, session, at, answer)
    return TurnRecord(
        turn, Session(tenant, session, session), "fp", "salt", messages, {}, Trace(b"", b"", None),
        response=response, request_input=[{"role": "user", "content": response_id}],
    )  # fmt: skip
