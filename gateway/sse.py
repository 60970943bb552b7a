"""Server-sent events: bytes in, event data out. Nothing else in the gateway knows SSE.

Two readers, for two needs. `events` reads a whole recorded stream, after the request. `UsageFilter` works on the
path: it hands every byte on untouched but for the one event that the gateway asked for and the client did not.
"""

import re
from collections.abc import Iterable, Iterator

# An event ends at an empty line; a line ends at CRLF, LF or CR (WHATWG HTML, "Server-sent events", 9.2.6).
# A CR at the very end of what has come may be half of a CRLF, so it is not an end yet.
_END_OF_EVENT = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")
_LINE = re.compile(rb"\r\n|\n|\r")


def events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the `data` of every complete event of a recorded stream, wherever its chunks were cut."""
    data: list[bytes] = []
    lines = _LINE.split(b"".join(chunks))
    for line in lines[:-1]:  # what follows the last line end is not a line yet
        if not line:
            if data:
                yield b"\n".join(data)
                data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))


class UsageFilter:
    """Takes the final usage event out of a stream for a client that did not ask for it.

    OpenAI's API marks it with an empty `choices` list, which no event of a reply has. Inside a JSON string the quotes
    would be escaped, so a model that talks about `"choices":[]` does not trigger it. A chunk that ends with an event
    and
    holds no such mark (all but one of a stream) is returned as it is; only an event that the network cut is held back
    until its end is there.
    """

    MARK = b'"choices":[]'

    def __init__(self) -> None:
        self._held = b""
        self.removed = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go to the client now; empty if it is held back."""
        if not self._held and chunk.endswith(b"\n\n") and self.MARK not in chunk:
            return chunk
        data = self._held + chunk
        ends = [m.end() for m in _END_OF_EVENT.finditer(data)]
        out: list[bytes] = []
        start = 0
        for end in ends:
            out.append(self._keep(data[start:end]))
            start = end
        self._held = data[start:]
        return b"".join(out)

    def flush(self) -> bytes:
        """Return what is still held when the stream has ended."""
        held, self._held = self._held, b""
        return held

    def _keep(self, event: bytes) -> bytes:
        if self.MARK not in event:
            return event
        self.removed += event
        return b""
