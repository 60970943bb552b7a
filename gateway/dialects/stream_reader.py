"""Read a recorded stream: the reply that its events make."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import orjson

from gateway.dialects import sse
from gateway.dialects.base import Reply, json_object
from gateway.records import Message, Usage

_AT_ONCE = 4096  # events; orjson lets no other thread run until it is done


class StreamReader(ABC):
    """Puts a reply together from the events of one stream."""

    last = "[DONE]"
    """What ends a complete stream: the data of its last event, or the type of an event that sets `complete`."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.error = ""
        self.complete = False

    def read(self, chunks: Iterable[bytes]) -> Reply:
        """Read the whole stream."""
        events = sse.events(chunks)
        if events[-1:] == [self.last.encode()]:
            self.complete = True
            del events[-1]
        for event in self.parse(events):
            if event is None:
                self.error = "the stream holds an event that is not a JSON object"
            elif (error := event.get("error")) is not None:
                self.error = str(error)
            else:
                self.add(event)
        if not self.error and not self.complete:
            self.error = f"the stream ended before {self.last}"
        message = None if self.error else self.message()
        return Reply(message, self.usage, self.error)

    def parse(self, events: list[bytes]) -> list[dict[str, Any] | None]:
        """Parse the data of events: None for each that is not a JSON object. Many are parsed in one go if all are."""
        starts = range(0, len(events), _AT_ONCE)
        return [value for start in starts for value in _parse(events[start : start + _AT_ONCE])]

    @abstractmethod
    def add(self, event: dict[str, Any]) -> None:
        """Take in one event that is not an error."""

    @abstractmethod
    def message(self) -> Message | None:
        """The message, once all events are read; None, with `error` set, where they make none."""


def _parse(events: list[bytes]) -> list[dict[str, Any] | None]:
    try:
        values: list[Any] = orjson.loads(b"[" + b",".join(events) + b"]")
    except orjson.JSONDecodeError:
        values = []
    if len(values) == len(events) and {*map(type, values)} <= {dict}:
        return values
    return [json_object(data) for data in events]
