"""Messages, and where a conversation stands after them."""

from collections.abc import Sequence
from typing import Any

from gateway.records import Session
from gateway.sessions import prefix_chain

SYSTEM = {"role": "system", "content": "You are terse."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def at(messages: list[dict[str, Any]], *, answered: bool = True, name: str = "s", start: bytes = b"") -> Session:
    """A session whose last turn is `messages`; the last of them is the reply if it was answered."""
    asked = messages[:-1] if answered else messages
    trace = prefix_chain.trace(start, asked, messages[-1] if answered else None)
    return Session(
        "t", name, name, last_request_hash=trace.request_hash, last_reply_hash=trace.reply_hash, answered=answered
    )


def unbooked(status: dict[str, Any]) -> dict[str, Any]:
    """The status of a window without what it has saved, which grows with every thaw and every question."""
    return {name: value for name, value in status.items() if name != "saved"}


def without_turns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the rows of `GET /admin/windows/{name}/messages`, which add the turn of each."""
    return [{name: value for name, value in row.items() if name != "turn"} for row in rows]
