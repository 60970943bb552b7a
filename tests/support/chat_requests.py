"""Chat requests, and the salts that the engine got."""

from typing import Any

from tests.support.fakes.engine import MODEL, FakeEngine

CHAT = "/v1/chat/completions"


HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


BODY: dict[str, Any] = {"model": MODEL, "messages": HI}


def salts(engine: FakeEngine, path: str = CHAT) -> list[Any]:
    """The salt of every request that the engine saw on a path."""
    return [request.json.get("cache_salt") for request in engine.seen(path)]
