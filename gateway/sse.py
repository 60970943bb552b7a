"""Server-sent events: bytes in, event data out. Nothing else in the gateway knows SSE.

Two readers, for two needs. `events` reads a whole recorded stream, after the request. `UsageFilter` works on the
path: it hands every byte on untouched but for the one event that the gateway asked for and the client did not.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

# An event ends at an empty line; a line ends at CRLF, LF or CR (WHATWG HTML, "Server-sent events", 9.2.6).
# A CR at the very end of what has come may be half of a CRLF, so it is not an end yet.
_END_OF_EVENT = re.compile(rb"(?:\r\n|\n|\r(?=[^\n])){2}")
_LINE = re.compile(rb"\r\n|\n|\r")


def events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the `data` of every complete event of a recorded stream, wherever its chunks were cut."""
    whole = b"".join(chunks)
    blocks = whole.split(b"\n\n")
    if _is_plain(whole, len(blocks) - 1):
        yield from (block[6:] for block in blocks[:-1])
        return
    named = _named(whole, blocks[:-1])
    if named is not None:
        yield from named
        return
    data: list[bytes] = []
    lines = _LINE.split(whole)
    for line in lines[:-1]:  # what follows the last line end is not a line yet
        if not line:
            if data:
                yield b"\n".join(data)
                data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))


def _is_plain(whole: bytes, events: int) -> bool:
    """Whether a stream is as every engine writes it: each event one line of data. A third of the time to read it."""
    return (
        whole.startswith(b"data: ")
        and whole.endswith(b"\n\n")
        and b"\r" not in whole
        and whole.count(b"\n") == 2 * events
        and whole.count(b"\n\ndata: ") == events - 1
    )


def _named(whole: bytes, blocks: Sequence[bytes]) -> list[bytes] | None:
    """The data of a stream whose every event is one line of name and one of data; None if it is another."""
    count = len(blocks)
    fits = whole.startswith(b"event: ") and whole.endswith(b"\n\n") and b"\r" not in whole
    if not fits or whole.count(b"\n") != 3 * count or whole.count(b"\n\nevent: ") != count - 1:
        return None
    data = [block.partition(b"\ndata: ")[2] for block in blocks]
    return data if all(data) else None


class UsageFilter:
    """Takes the final usage event out of a stream for a client that did not ask for it, and leaves no trace of it.

    A chunk that ends with an event and holds no mark (all but two of a stream) is returned as it is; only an event that
    the network cut is held back until its end is there.

    OpenAI's API marks the usage event with an empty `choices` list, which no event of a reply has. Inside a JSON string
    the quotes would be escaped, so a model that talks about `"choices":[]` does not trigger it. vLLM stamps its
    `system_fingerprint` on the usage event if there is one, else on the event that finishes a choice
    (`chat_completion/serving.py`); so what finishes a choice gets the stamp that it would have had. The stamp is the
    same for every answer of an engine: `stamp` is what an earlier stream had (b"" for none), None if there was none
    yet, and then the last events wait for the usage event, which follows at once.
    """

    USAGE = b'"choices":[]'
    FINISH = b'"finish_reason":"'
    _STAMP = re.compile(rb'(,"system_fingerprint":"[^"]*")[^{}]*\}\s*$')

    def __init__(self, stamp: bytes | None = b"") -> None:
        self.stamp = stamp
        self._held: list[bytes] = []  # pieces of an event whose end has not come
        self._waiting: list[bytes] = []

    def untouched(self, chunks: Sequence[bytes]) -> bool:
        """Whether these chunks are whole events that may all go as they are, so that none needs to be fed."""
        if self._held or self._waiting or not all(chunk.endswith(b"\n\n") for chunk in chunks):
            return False
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        return self.USAGE not in data and self.FINISH not in data

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go to the client now; empty if it is held back."""
        marked = self.USAGE in chunk or self.FINISH in chunk
        if not marked and not self._held and not self._waiting and chunk.endswith(b"\n\n"):
            return chunk
        # Only what is new can hold an end, but for the few bytes of one that were there before.
        before = b"".join(self._held[-3:])[-3:] if self._held else b""
        if not _END_OF_EVENT.search(before + chunk):
            self._held.append(chunk)
            return b""
        data = b"".join((*self._held, chunk))
        out: list[bytes] = []
        start = 0
        for end in (m.end() for m in _END_OF_EVENT.finditer(data)):
            out.append(self._event(data[start:end]))
            start = end
        self._held = [data[start:]] if start < len(data) else []
        return b"".join(out)

    def flush(self) -> bytes:
        """Return what is still held when the stream has ended."""
        held = b"".join((*self._waiting, *self._held))
        self._waiting, self._held = [], []
        return held

    def _event(self, event: bytes) -> bytes:
        if self.USAGE in event:
            return self._usage(event)
        if self.stamp is None and (self._waiting or self.FINISH in event):
            self._waiting.append(event)
            return b""
        return self._stamped(event)

    def _usage(self, event: bytes) -> bytes:
        found = self._STAMP.search(event)
        self.stamp = found[1] if found else b""
        waiting, self._waiting = self._waiting, []
        return b"".join(self._stamped(one) for one in waiting)

    def _stamped(self, event: bytes) -> bytes:
        if not self.stamp or self.FINISH not in event:
            return event
        end = event.rindex(b"}")
        return event[:end] + self.stamp + event[end:]
