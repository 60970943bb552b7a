"""Parse the data of server-sent events as JSON objects."""

from typing import Any

import orjson

_AT_ONCE = 4096  # events; orjson lets no other thread run before it is done


def objects(events: list[bytes]) -> list[dict[str, Any] | None]:
    """Read the data of all events, None for each that is no JSON object; many in one go where they all are."""
    starts = range(0, len(events), _AT_ONCE)
    return [value for start in starts for value in _objects(events[start : start + _AT_ONCE])]


def _objects(events: list[bytes]) -> list[dict[str, Any] | None]:
    try:
        found: list[Any] = orjson.loads(b"[" + b",".join(events) + b"]")
    except orjson.JSONDecodeError:
        found = []
    if len(found) == len(events) and all(isinstance(value, dict) for value in found):
        return found
    return [json_object(data) for data in events]


def json_object(data: bytes) -> dict[str, Any] | None:
    """Read a JSON object; None for any other value."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
