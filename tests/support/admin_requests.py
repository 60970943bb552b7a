"""Requests to the admin API."""

from typing import Any

from tests.support.gateway_process import Gateway


def error_of(response: Any) -> tuple[int, str]:
    """Status and code; the shape has to be whole."""
    error = response.json()["error"]
    assert set(error) == {"code", "message", "hint", "retryable", "details"}
    assert error["message"]
    assert isinstance(error["retryable"], bool)
    assert response.headers["content-type"] == "application/json"
    return response.status_code, error["code"]


def freeze(gateway: Gateway, session: str, name: str, **more: Any) -> dict[str, Any]:
    """One turn, then a window of it."""
    gateway.chat(session)
    response = gateway.freeze(session, name, **more)
    assert response.status_code == 201, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer
