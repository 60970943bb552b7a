"""JSON objects from the data of events."""

from typing import Any

import orjson


def objects(events: list[bytes]) -> list[dict[str, Any] | None]:
    """Read the data of all events, None for each that is no JSON object; in one go where they all are."""
    try:
        found: list[Any] = orjson.loads(b"[" + b",".join(events) + b"]")
    except orjson.JSONDecodeError:
        found = []
    if len(found) == len(events) and all(isinstance(value, dict) for value in found):
        return found
    return [json_object(data) for data in events]


def json_object(data: bytes) -> dict[str, Any] | None:
    """Read a JSON object, None for whatever else it is."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
